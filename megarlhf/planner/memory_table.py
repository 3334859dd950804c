"""Bytes on each device in each phase of a run, by role and part; config/roles.py says who is awake."""

from collections.abc import Mapping
from dataclasses import dataclass

from megarlhf.config.roles import ENGINE_PARTS, PARTS, Phase, row_of
from megarlhf.planner.memory import RankBytes

GIB = 2**30
PROCESS_BYTES = GIB  # of a process on a GPU, asleep too: CUDA's context and kernels, communicators (0.5 to 2 GiB seen)
FRAGMENTATION = 0.05  # of what training allocates (published peaks are 3 to 8% above the sum of their tensors)
_ORDER = (
    *("parameters", "gradients", "optimizer", "reference", "teacher", "teacher output", "activations", "logits"),
    *("weights", "kv cache", "sync bucket", "weight buckets", "fragmentation", "processes"),
    *("gathered", "asleep", "stepped here", "checkpoint"),
)


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """One rank of an inference engine."""

    weights: int
    kv_cache: int  # on a GPU with what its passes need besides: all of its share of the memory but the weights
    one_sequence: int  # what the KV cache of the longest sequence takes
    bucket: int  # weights on their way in a sync: the largest module, which vLLM's reload has on the device twice
    weight_buckets: int = 0  # of weights that are received


RoleBytes = RankBytes | EngineBytes
Column = dict[tuple[str, str], int]  # (role, part) -> bytes


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """The fullest of the devices that the same roles are on."""

    devices: str  # in words
    roles: tuple[str, ...]
    phases: dict[str, Column]

    def total(self, phase: str) -> int:
        """Bytes of all roles in a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        """Where the most is on the device."""
        return max(self.phases, key=self.total)

    def text(self, memory: int | None) -> str:
        """Aligned lines: a row a part, a column a phase.

        Args:
            memory: bytes of the device, None where they are not known.
        """
        peak = self.total(self.peak_phase)
        name, unit = ("GiB", GIB) if peak >= GIB else ("MiB", 2**20)
        held = {key for column in self.phases.values() for key, size in column.items() if size}
        keys = sorted(held, key=self._place)
        rows = [("role", "part", *self.phases)]
        for key in keys:
            rows.append((*key, *(_amount(column.get(key, 0), unit) for column in self.phases.values())))
        rows.append(("sum", "", *(_amount(self.total(phase), unit) for phase in self.phases)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{name} on {self.devices}"]
        for row in rows:
            words = list(map(str.ljust, row[:2], widths[:2]))  # numbers to the right
            lines.append("  ".join(words + list(map(str.rjust, row[2:], widths[2:]))).rstrip())
        left = "" if memory is None else f", {(memory - peak) / GIB:.2f} GiB of {memory / GIB:.4g} left"
        return "\n".join([*lines, f"peak: {self.peak_phase}, {peak / unit:.2f} {name}{left}"])

    def _place(self, key: tuple[str, str]) -> tuple[int, int]:
        """Of a row: roles in their order, parts in theirs."""
        role, part = key
        return [*self.roles, "all"].index(role), _ORDER.index(part)


Place = tuple[int, int]  # a node, and a device there
Slots = Mapping[Place, Mapping[str, RoleBytes]]  # -> name of a role -> what its rank takes there


def device_tables(slots: Slots, *, colocated: bool, gpu: bool, resident: bool = False) -> list[DeviceTable]:
    """One table for each set of roles that share devices.

    Args:
        slots: what lies on each device. The first role that trains is the policy.
        colocated: roles take turns; else nothing sleeps but gradients and the reference.
        gpu: count what a GPU's processes and allocator take besides.
        resident: the reference and reward models never sleep.
    """
    tables = []
    options = {"colocated": colocated, "gpu": gpu, "resident": resident}
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place, held in slots.items():
        groups.setdefault(tuple(held), []).append(place)
    for roles, places in groups.items():
        candidates = {place: _phases(slots[place], **options) for place in places}
        peaks = {place: max(sum(c.values()) for c in phases.values()) for place, phases in candidates.items()}
        node, device = fullest = max(places, key=lambda place: peaks[place])
        words = f"device {device}" + (f" of node {node}" if len({node for node, _ in slots}) > 1 else "")
        words += f", the fullest of {len(places)}" if len(places) > 1 else ""
        tables.append(DeviceTable(devices=f"{words} ({', '.join(roles)})", roles=roles, phases=candidates[fullest]))
    return tables


def host_table(slots: Slots, *, colocated: bool, resident: bool, gpu: bool) -> DeviceTable:
    """What the fullest node's host holds for its devices: copies of what sleeps, and what is stepped there.

    The processes' own memory, weights on their way and tokens are left out.

    Args:
        resident: the reference and reward models stay on the devices.
    """
    nodes: dict[int, list[tuple[str, RoleBytes]]] = {}
    for (node, _), held in slots.items():
        nodes.setdefault(node, []).extend(held.items())
    columns: dict[int, dict[str, Column]] = {}
    for node, ranks in nodes.items():
        kept: Column = {}
        saved: dict[str, int] = {}
        for role, taken in ranks:
            parts = {"asleep": asleep_bytes(role, taken, colocated=colocated, resident=resident, gpu=gpu)}
            if isinstance(taken, RankBytes):
                parts["stepped here"] = taken.host_optimizer
                saved[role] = saved.get(role, 0) + taken.host_gathered * row_of(role).trains
            for part, size in parts.items():
                kept[role, part] = kept.get((role, part), 0) + size
        kept = {key: size for key, size in kept.items() if size}
        role = max(saved, key=lambda name: saved[name], default="")  # one after another
        columns[node] = {"steps": kept, "save": kept | ({(role, "checkpoint"): saved[role]} if role else {})}
    fullest = max(columns, key=lambda node: sum(columns[node]["save"].values()))
    roles = tuple(dict.fromkeys(role for role, _ in nodes[fullest]))
    words = "the host" if len(nodes) == 1 else f"the host of node {fullest}, the fullest of {len(nodes)}"
    return DeviceTable(devices=words, roles=roles, phases=columns[fullest])


def asleep_bytes(role: str, taken: RoleBytes, *, colocated: bool, resident: bool, gpu: bool) -> int:
    """Host copies of a rank's parts that are off the device in some phase; they stay when it has them again.

    vLLM keeps its weights where no sync replaces them, on GPUs.
    """
    if isinstance(taken, EngineBytes):
        return taken.weights if colocated and gpu else 0
    reference = taken.teacher + (0 if resident else taken.reference)
    if not colocated or (resident and not row_of(role).trains):
        return reference
    kept: list[int] = [getattr(taken, part) for part in row_of(role).parts]
    return reference + sum(kept)


def misfits(tables: list[DeviceTable], engine: EngineBytes | None, memory: int) -> list[tuple[str, str]]:
    """(phase, sentence without a remedy) for each phase that takes more than the device has."""
    found = []
    if engine is not None and engine.kv_cache < engine.one_sequence:
        said = f"role rollout: {engine.weights / GIB:.2f} GiB of weights leave {engine.kv_cache / GIB:.2f} GiB of its "
        said += f"share of the memory for a KV cache, and one sequence takes {engine.one_sequence / GIB:.2f} GiB"
        found.append(("rollout", said))
    for table in tables:
        for phase, column in table.phases.items():
            if (total := table.total(phase)) > memory:
                (role, part), largest = max(column.items(), key=lambda entry: entry[1])
                said = f"phase {phase} takes {total / GIB:.2f} GiB ({total} bytes) on {table.devices}, most of it "
                found.append((phase, f"{said}{part} of role {role} ({largest / GIB:.2f} GiB)"))
    return found


def _phases(held: Mapping[str, RoleBytes], *, colocated: bool, gpu: bool, resident: bool) -> dict[str, Column]:
    """Columns of one device."""
    models = [role for role, taken in held.items() if isinstance(taken, RankBytes)]
    training = [role for role in models if row_of(role).trains]
    judges = [role for role in models if "reward" in row_of(role).awake]
    columns: dict[str, Column] = {}
    if len(models) < len(held):
        columns["rollout"] = _awake(held, "rollout", colocated=colocated)
    for role in judges:  # one after another where they share devices
        columns[role] = _awake(held, "reward", colocated=colocated) | _passes(held, role, update=False)
    if len(models) > len(judges):
        columns["experience"] = _awake(held, "train", colocated=colocated) | _passes(held, models[0], update=False)
        for role in training:
            name = "update" if len(training) == 1 else f"update {role}"
            columns[name] = _awake(held, "train", colocated=colocated) | _passes(held, role, update=True)
    buckets = {(role, "weight buckets"): taken.weight_buckets for role, taken in held.items() if taken.weight_buckets}
    if buckets or len(models) < len(held):
        columns["sync"] = _awake(held, "sync", colocated=colocated) | buckets
        columns["sync"] |= {(r, "sync bucket"): e.bucket for r, e in held.items() if isinstance(e, EngineBytes)}
    columns["save"] = _awake(held, "checkpoint", colocated=colocated)
    gathered = {role: taken.gathered for role in training if isinstance(taken := held[role], RankBytes)}
    if largest := max(gathered, key=lambda role: gathered[role], default=None):  # they are saved one after another
        columns["save"] |= {(largest, "gathered"): gathered[largest]} if gathered[largest] else {}
    for column in columns.values() if resident else ():
        for role in models:
            kept = ("reference",) if row_of(role).trains else PARTS[:1]
            column |= {(role, part): size for part in kept if (size := getattr(held[role], part))}
    for column in columns.values() if gpu else ():
        allocated = sum(size for (role, _), size in column.items() if role in models)
        if allocated:
            column["all", "fragmentation"] = int(FRAGMENTATION * allocated)
        column["all", "processes"] = PROCESS_BYTES * len(held)
    return columns


def _awake(held: Mapping[str, RoleBytes], phase: Phase, *, colocated: bool) -> Column:
    column: Column = {}
    for role, taken in held.items():
        spec = row_of(role)
        names = spec.awake.get(phase, ()) if colocated else spec.parts
        order = (*PARTS, *ENGINE_PARTS)
        column |= {(role, part.replace("_", " ")): getattr(taken, part) for part in order if part in names}
    return column


def _passes(held: Mapping[str, RoleBytes], role: str, *, update: bool) -> Column:
    """What computing brings: of the role's optimizer step, or of forward passes, the reference's and teacher's too."""
    taken = held[role]
    assert isinstance(taken, RankBytes)
    sizes = {"gradients": taken.gradients, "activations": taken.backward}
    if not update:
        sizes = {"reference": taken.reference, "teacher": taken.teacher, "activations": taken.forward}
    sizes |= {"teacher output": taken.teacher_output, "logits": taken.logits}
    return {(role, part): size for part, size in sizes.items() if size}


def _amount(number: int, unit: int) -> str:
    return f"{number / unit:.2f}" if number else "-"
