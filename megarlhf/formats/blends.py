"""Megatron's options for indexed data sets: several files with weights, and how documents are split."""

import math
import os


def parse_blend(data_path: tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    """File prefixes and their weights: "w1 p1 w2 p2", or prefixes alone, which have none.

    Weights are taken where every other text, the first included, is a number, as megatron-core does.
    """
    weights = [_number(text) for text in data_path[::2]]
    if len(data_path) % 2 or None in weights:
        return list(data_path), None
    return list(data_path[1::2]), [weight for weight in weights if weight is not None]


def parse_split(split: str) -> tuple[float, float, float] | None:
    """Parts of training, validation and test in "949,50,1"; None where it is no such text, or nothing is trained on."""
    parts = [_number(text) for text in split.split(",")]
    given = [part for part in parts if part is not None and part >= 0]
    if not 1 <= len(given) == len(parts) <= 3 or not given[0] > 0:
        return None
    first, second, third = (*given, 0.0, 0.0)[:3]
    return first, second, third


def split_bounds(parts: tuple[float, float, float], number: int) -> list[int]:
    """The number of the first document of training, validation and test, and the end; rounded as megatron-core does."""
    shares = [part / sum(parts) for part in parts]
    ends = [shares[0], shares[0] + shares[1], shares[0] + shares[1] + shares[2]]
    return [0, *(round(end * float(number)) for end in ends)]


def blend_errors(data_path: tuple[str, ...]) -> list[str]:
    """What is wrong with a blend as far as the names of files tell, in sentences for the user."""
    prefixes, weights = parse_blend(data_path)
    errors = [
        f"data_path={prefix} has no file {prefix}{suffix}: give the path of an indexed data set without .bin and .idx "
        "(tools/preprocess_data.py makes one), several as: weight prefix weight prefix"
        for prefix in prefixes
        for suffix in (".idx", ".bin")
        if not os.path.isfile(prefix + suffix)
    ]
    if weights is not None and min(weights) <= 0:
        errors.append(f"data_path={' '.join(data_path)}; weights are above 0: leave out what is not to be drawn")
    return errors


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
