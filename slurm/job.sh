# shellcheck shell=bash
# What the scripts of slurm/ share: nodes, addresses, ports, steps, and the end of a job. They source it in the directory
# of the repository, after site.env.

say() { printf '[%s] %s\n' "$(date +%T)" "$*"; }
fail() { say "error: $*" >&2; exit 2; }

# start_job NAME: sets nodes, node_ip, head, head_ip, port, SAVE, logs, SEED and what is put in front of commands.
start_job() {
    SAVE=${SAVE:-runs/$1-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # each task has a run and a seed of its own
        SAVE=$SAVE/task-$SLURM_ARRAY_TASK_ID
        SEED=$((${SEED:-42} + SLURM_ARRAY_TASK_ID))
        export SEED
    fi
    logs=$SAVE/slurm
    mkdir -p "$logs"
    export SAVE PYTHON PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    set_containers
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${nodes[0]}
    export NNODES=${#nodes[@]}
    set_ports
    declare -gA node_ip=()
    find_addresses
    # shellcheck disable=SC2034 # the scripts read it
    head_ip=${node_ip[$head]}
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${nodes[*]}, ports $port-$((port + PORTS_PER_JOB - 1)), $SAVE"
}

# launcher_name LAUNCHER
launcher_name() {
    [ -x "${1:-}" ] || fail "${1:-no launcher}: name an executable one, such as examples/ppo_llama3_8b_h100.sh"
    basename "$1" .sh
}

set_ports() {
    local blocks=$(((PORT_LAST - PORT_FIRST + 1) / PORTS_PER_JOB))
    if [ "$blocks" -lt 1 ] || [ "$PORTS_PER_JOB" -lt 40 ]; then
        fail "PORTS_PER_JOB=$PORTS_PER_JOB: at least 40, of the ports PORT_FIRST=$PORT_FIRST to PORT_LAST=$PORT_LAST"
    fi
    port=$((PORT_FIRST + SLURM_JOB_ID % blocks * PORTS_PER_JOB))
}

set_containers() {
    step_options=() in_container=()
    local mounts="$PWD:$PWD,$LOCAL_DIR:$LOCAL_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    case $CONTAINER in
        none) return ;;
        pyxis)
            step_options=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
        apptainer) in_container=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE") ;;
        *) fail "CONTAINER=$CONTAINER: none, pyxis or apptainer" ;;
    esac
    [ -n "$CONTAINER_IMAGE" ] || fail "CONTAINER=$CONTAINER needs CONTAINER_IMAGE"
}

# Of each node the address at NETWORK_INTERFACE, or else the one that Slurm itself uses. Not what its name resolves to,
# which on the node itself may be 127.0.1.1.
find_addresses() {
    local node
    for node in "${nodes[@]}"; do
        if [ -n "$NETWORK_INTERFACE" ]; then
            node_ip[$node]=$(srun --overlap -N1 -n1 -w "$node" ip -o -4 addr show dev "$NETWORK_INTERFACE" |
                awk 'NR == 1 { sub(/\/.*/, "", $4); print $4 }')
        else
            node_ip[$node]=$(scontrol -o show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' |
                xargs getent ahostsv4 | awk 'NR == 1 { print $1 }')
        fi
        [ -n "${node_ip[$node]}" ] || fail "no address of node $node${NETWORK_INTERFACE:+ at $NETWORK_INTERFACE}"
    done
}

# step NAME NODE COMMAND...: runs on a node in the background, and sets step_id, its srun. The log goes on where an earlier
# start has ended; the directory of temporary files, which `scratch NAME` prints, ends with the step.
step() {
    local name=$1 node=$2 pipe orders
    shift 2
    pipe=$(mktemp -u)
    mkfifo -m 600 "$pipe"
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none --export=ALL --open-mode=append \
        --output="$logs/$name.$node.log" "${step_options[@]}" \
        "${in_container[@]}" "$PYTHON" slurm/step.py --grace-seconds "$GRACE_SECONDS" \
        --scratch "$(scratch "$name")" -- "$@" < "$pipe" &
    step_id=$!
    steps+=("$step_id")
    exec {orders}> "$pipe"
    orders_of[$step_id]=$orders
    rm "$pipe"
}
declare -A orders_of=()
scratch() { echo "$LOCAL_DIR/$SLURM_JOB_ID.$1"; }
steps=()

# order TERM|USR1 STEP_ID: for step.py.
order() { if kill -0 "$2" 2>/dev/null; then echo "$1" >&"${orders_of[$2]}"; fi; }
trap '' PIPE # of a step that ends meanwhile

# Traps run between foreground commands only, so every long wait is one of the shell's own.
usr1_at=
trap 'usr1_at=${usr1_at:-$SECONDS}' USR1
trap 'trap "" TERM; say "TERM: ending"; end_steps; exit 143' TERM

# await STEP_ID [MORE]: waits for the end of the first, and passes USR1 on to all, until SAVE_SECONDS are over (status 124).
await() {
    local step=$1 last=
    while kill -0 "$step" 2>/dev/null; do
        if [ -n "$usr1_at" ]; then
            if [ $((SECONDS - usr1_at)) -ge "$SAVE_SECONDS" ]; then return 124; fi
            if [ -z "$last" ] || [ $((SECONDS - last)) -ge 5 ]; then # again, should it not listen yet
                last=$SECONDS
                for step in "$@"; do order USR1 "$step"; done
                step=$1
            fi
        fi
        sleep 1 &
        wait $! || continue
    done
    wait "$step"
}

# Ends all steps at once.
end_steps() {
    local step until=$((SECONDS + GRACE_SECONDS + 5)) left
    for step in "${steps[@]}"; do order TERM "$step"; done
    while [ "$SECONDS" -lt "$until" ]; do
        left=
        for step in "${steps[@]}"; do if kill -0 "$step" 2>/dev/null; then left=1; fi; done
        [ -n "$left" ] || return 0
        sleep 0.2
    done
    say "steps did not end in time: Slurm kills them"
}

# finish STATUS: the job's end after that of its run, or its way back to the queue.
finish() {
    local status=$1 starts=${SLURM_RESTART_COUNT:-0}
    end_steps
    if [ -n "$usr1_at" ] && [ "$status" -eq 124 ]; then
        say "SAVE_SECONDS=$SAVE_SECONDS are over: the last checkpoint counts"
    elif [ -z "$usr1_at" ] || { [ "$status" -ne 0 ] && [ ! -f "$SAVE/checkpoints/latest_checkpointed_iteration.txt" ]; }; then
        say "the run's status is $status"
        exit "$status"
    elif [ "$status" -ne 0 ]; then
        say "the run has failed after USR1, with status $status: the last checkpoint counts"
    fi
    if [ "$starts" -ge "$MAX_REQUEUES" ]; then
        say "error: not requeued again, MAX_REQUEUES=$MAX_REQUEUES; sbatch it once more with SAVE=$SAVE to go on" >&2
        exit 1
    fi
    say "requeued, $((MAX_REQUEUES - starts - 1)) more times possible"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 & # Slurm ends this shell
        wait $!
    fi
    say "error: Slurm did not requeue it; sbatch it once more with SAVE=$SAVE to go on" >&2
    exit 1
}
