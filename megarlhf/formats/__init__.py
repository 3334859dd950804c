"""Files and memory by format; nothing here knows a model.

    huggingface        config.json and *.safetensors of a checkpoint as it is published; safetensors_file, one such file
    torch_dist         Megatron-Core's distributed checkpoints; megatron, run_checkpoints: where they lie, and a run's
    shared_memory      tensors of one process that others on the host read; buckets, for those that cannot
    staging            what is written appears whole or not at all
    json_files, threads    small helpers of these
"""
