"""Every option of every program reaches what it is for, and changes what a run does. One entry for each option."""

from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.command_line import options_of
from megarlhf.config.eval_config import EvalConfig
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig, ScoreConfig, SelectConfig
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, ParityConfig, SFTConfig
from tests.config.in_process_programs import Programs
from tests.config.option_probes import SAME, Probe
from tests.config.option_probes_chat import CHAT
from tests.config.option_probes_eval import EVAL
from tests.config.option_probes_kd import KD
from tests.config.option_probes_loops import GENERATE, SCORE, SELECT
from tests.config.option_probes_ppo import PPO
from tests.config.option_probes_preferences import DPO, KTO
from tests.config.option_probes_rest import PARITY, PRM, RM, SFT
from tests.config.option_probes_serve import SERVE

TABLES = {
    "ppo": (PPOConfig, PPO),
    "sft": (SFTConfig, SFT),
    "kd": (KDConfig, KD),
    "dpo": (DPOConfig, DPO),
    "kto": (KTOConfig, KTO),
    "rm": (RMConfig, RM),
    "prm": (PRMConfig, PRM),
    "parity": (ParityConfig, PARITY),
    "chat": (ChatConfig, CHAT),
    "serve": (ServeConfig, SERVE),
    "generate": (GenerateConfig, GENERATE),
    "score": (ScoreConfig, SCORE),
    "select": (SelectConfig, SELECT),
    "eval": (EvalConfig, EVAL),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("program", TABLES)
def test_every_option_has_an_entry(program: str) -> None:
    config_class, table = TABLES[program]
    assert set(table) == set(options_of(config_class))


@pytest.mark.parametrize(
    ("program", "option"), [(program, option) for program, (_, table) in TABLES.items() for option in table]
)
def test_option(programs: Programs, program: str, option: str) -> None:
    probe: Probe = TABLES[program][1][option]
    run: Any = getattr(programs, program)
    without = run(tuple((probe.also | probe.before).items()))
    changed = run(tuple((probe.also | probe.before | {option: probe.value}).items()))
    expected = probe.value if probe.expected is SAME else probe.expected
    assert probe.seen(changed) == expected, changed.error
    assert _seen(probe, without) != expected, "the option changes nothing here"


def _seen(probe: Probe, trace: Any) -> Any:
    """What the run without the option shows; nothing where it never came to what is looked at."""
    try:
        return probe.seen(trace)
    except (IndexError, KeyError, StopIteration):
        return None
