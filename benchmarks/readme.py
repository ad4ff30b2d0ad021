"""Write the tables of the documents from benchmarks/results/*.json: they quote nothing else.

Run:  python benchmarks/readme.py
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy.augmentations import EACH, MIXED
from benchmarks.harness import spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """One result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table, and a sentence under it; a column whose title begins with > stands right."""
    rule = "".join("|--:" if title.startswith(">") else "|---" for title in head) + "|"
    titles, *body = (f"| {' | '.join(r)} |" for r in ([c.lstrip(">") for c in head], *rows))
    return "\n".join([titles, rule, *body, *(["", note] if note else [])])


def machine(result: Mapping[str, Any]) -> str:
    """What it was measured on, and when."""
    return f"{result['hardware']}, torch {result['torch']}, {result['date']}"


def flows_table() -> str:
    """Size, bits/dim, exactness and data of every shipped flow."""
    quality = "bits/dim (test; less is better)"
    head = ("name", "images", "size", quality, "round trip", "in bf16", "data")
    rows = [
        (
            f"`{name}`", flow["images"], f"{flow['megabytes']} MB", f"{flow['bits_per_dim']:.2f}",
            f"{max(flow['round_trip'].values()):.0e}",
            f"{flow['bf16']['round_trip_max']:.0e}, "
            f"{flow['bf16']['gradient_sign_agreement']:.1%}",
            flow["data"],
        )
        for name, flow in load("flows")["flows"].items()
    ]  # fmt: skip
    note = (
        "Round trip: the largest |decode(encode(x)) − x| on real, mixed, black, white and noise "
        "images. In bf16: the same on real images with bfloat16 coupling networks, and the share "
        "of signs of the latent gradient that stay."
    )
    return markdown(head, rows, note)


def speed_table() -> str:
    """Time and memory ratios of the frozen decoder."""
    result = load("speed-flow-cpu")
    settings = [name for name in result["results"] if "kept" not in name]
    runs = {
        "decode + gradient, float32": ("decode+vjp, float32", "float32"),
        "decode + gradient, bf16 networks": ("decode+vjp, bf16 nets", "bf16 nets"),
        'decode + gradient, `memory="low"`': ("decode+vjp, low memory", "low memory"),
        "encode + gradient at z (no decode), float32": ("encode+vjp, float32", None),
        "encode + gradient at z, bf16 networks": ("encode+vjp, bf16 nets", None),
    }
    head = [
        "", *(f"time, {s}" for s in settings), "memory kept",
        *(f"/ ResNet-18, {s}" for s in settings),
    ]  # fmt: skip
    rows = []
    for title, (run, kept) in runs.items():
        found = [result["results"][s]["ratios"] for s in settings]
        times = [f"{r[f'{run} / normflows']['median']:.2f}" for r in found]
        classifier = [f"{r[f'{run} / resnet18']['median']:.2f}" for r in found]
        memory = "–"
        if kept is not None:
            share = result["results"][settings[0]]["memory_ratios"]
            memory = f"{share[f'memory, {kept} / normflows']:.3f}"
        rows.append([title, *times, memory, *classifier])
    first = "decode+vjp, float32 / normflows"
    slower = {n: r["ratios"][first]["median"] for n, r in result["results"].items() if "kept" in n}
    quoted = " and ".join(f"{v:.2f} ({n.split(',')[0]})" for n, v in slower.items())
    note = (
        f"{machine(result)}. The last columns are "
        "shares of a CIFAR ResNet-18's float32 forward + backward to the image. With an allocator "
        f"that keeps freed memory, which spares normflows most, the first row is {quoted}."
    )
    return markdown(head, rows, note)


def attack_table() -> str:
    """Time of ten steps against other libraries and against the floor."""
    result = load("speed-attack-cpu")
    ratios = {setting: found["ratios"] for setting, found in result["results"].items()}
    runs = next(iter(ratios.values()))
    rows = [
        [run.partition(" / ")[0], *(spread(found[run]) for found in ratios.values())]
        for base in ("minimal loop", "its floor")
        for run in runs
        if run.partition(" / ")[2] == base
    ]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    note = (
        f"Median [quartiles] of {result['rounds']} interleaved rounds. {result['hardware']}, torch "
        f"{result['torch']}, {peers}, {result['date']}."
    )
    return markdown(["", *ratios], rows, note)


def cost_table() -> str:
    """Time of a training step, of the usual transforms alone."""
    columns = {
        "ResNet-18": "speed-step-cpu", "ResNet-50, 224 px": "speed-step-224-cpu",
        "ResNet-18, bf16, GPU": "speed-step-bf16-gpu",
    }  # fmt: skip
    results = [load(name) for name in columns.values()]
    names = (
        "mixup", "RobustMixup", "JointSpaceAdv", "IJSAT", "IJSAT, bf16", "IJSAT, bf16, fast flow",
        "IJSAT, replay, bf16, fast flow", "RobustMixup, bf16, captured", "IJSAT, bf16, captured",
        "IJSAT, bf16, fast flow, captured",
    )  # fmt: skip
    rows = [[name, *(_time_and_memory(r, name)[0] for r in results)] for name in names]
    where = ", ".join(dict.fromkeys(r["hardware"] for r in results))
    note = (
        '"fast flow": `cifar10-fast` instead of `cifar10`; "replay": the second showing of a batch '
        'that is shown twice; "captured": `AugmentedLoader(..., captured=True)`. '
        f"Median [quartiles] of interleaved rounds. {where}."
    )
    return markdown(["", *columns], rows, note)


def step_table() -> str:
    """Time and memory of a training step."""
    result, large = load("speed-step-cpu"), load("speed-step-224-cpu")
    head = ("", "time", "peak memory", "time, 224 px", "peak memory")
    rows = [
        [name, *_time_and_memory(result, name), *_time_and_memory(large, name)]
        for name in result["ratios"]
        if name != "plain"
    ]
    note = (
        f"Median [quartiles] of {result['rounds']} interleaved rounds; one attack step where no "
        f"number is given. {machine(result)}."
    )
    return markdown(head, rows, note)


def gpu_step_table() -> str:
    """The same on a GPU; nothing where nobody has measured it."""
    there = {n: title for n, title in _STEPS_ON_GPU.items() if (RESULTS / f"{n}.json").is_file()}
    if not there:
        return ""
    results = {title: load(name) for name, title in there.items()}
    head = ["", *(cell for title in results for cell in (f"time, {title}", "peak memory"))]
    names = dict.fromkeys(name for result in results.values() for name in result["ratios"])
    rows = [
        [name, *(cell for r in results.values() for cell in _time_and_memory(r, name))]
        for name in names
        if name != "plain"
    ]
    told = "; ".join(
        f"{title}: batch {r['batch']}{', channels-last' * r['channels_last']}, a plain step takes "
        f"{r['ms']['plain']:.1f} ms"
        for title, r in results.items()
    )
    last = next(reversed(results.values()))
    note = f"{told}. Median [quartiles] of {last['rounds']} interleaved rounds. {machine(last)}."
    return f"{_ON_A_GPU}\n\n" + markdown(head, rows, note)


_ON_A_GPU = (
    'An ordinary loop on a GPU; "captured" repeats the attack as a CUDA graph, the other rows '
    "launch every kernel:"
)
_STEPS_ON_GPU = {
    "speed-step-gpu": "float32",
    "speed-step-bf16-gpu": "bf16",
    "speed-step-224-gpu": "224 px",
    "speed-step-224-bf16-gpu": "224 px, bf16",
}


def _time_and_memory(result: Mapping[str, Any], name: str) -> tuple[str, str]:
    if name not in result["ratios"]:
        return "", ""
    memory = result["memory_ratios"].get(name)
    return spread(result["ratios"][name]), "" if memory is None else f"{memory:.2f}"


def strength_table() -> str:
    """What stands on the Pareto front of loss against time, and what does not."""
    result = load("strength-cpu")
    time = {name: ratio["median"] for name, ratio in result["ratios"].items()}
    rows = [
        (
            name.replace("1 steps", "1 step"), f"{time[name]:.3f}", f"{result['gains'][name]:.2f}",
            "yes" if name in result["front"] else "",
        )
        for name in sorted({*result["front"], *_BESIDE_THE_FRONT}, key=time.__getitem__)
    ]  # fmt: skip
    note = (
        f"Clean loss {result['clean_loss']:.2f}; times in plain training steps. Median of "
        f"{result['rounds']} interleaved rounds. {machine(result)}."
    )
    return markdown(("", "time", "loss gained", "on the front"), rows, note)


_BESIDE_THE_FRONT = (
    "pixel, 1 steps", "pixel, 1 steps, bf16", "latent, linear", "joint, 1 steps", "joint, linear",
    "joint, linear, bf16 model", "joint, linear, bf16 flow", "joint, linear, bf16",
    "joint, linear, bf16, channels-last", "joint, linear, channels-last",
    "joint, linear, compiled model", "joint, linear, half of the batch", "joint, replay",
)  # fmt: skip


def shapes_table() -> str:
    """Flows of other shapes, trained for the same time."""
    head = ("flow", "trained", "bits/dim", "time of a latent step", "loss gained")
    rows = [
        (
            f"`{name}`" if name.startswith("cifar10") else name, f"{flow['minutes']:.0f} min",
            f"{flow['bits_per_dim']:.2f}", f"{flow['ratio']['median']:.2f}", f"{flow['gain']:.2f}",
        )
        for name, flow in load("flow-shapes")["flows"].items()
    ]  # fmt: skip
    return markdown(head, rows)


def lowdata_table() -> str:
    """Accuracy with few labels, at equal steps and at equal time."""
    rivals = {"mixup": "mixup", EACH: EACH, "mixup for as long": "mixup, for as long as {}"}
    return _study(load("lowdata-cifar10"), ">labels", rivals)


def few_table() -> str:
    """Accuracy with few labels in short: what the preset stands beside, and what it is ahead."""
    result = load("lowdata-cifar10")
    tables = result["table"].values()
    longer = f"mixup, for as long as {MIXED}"
    names = {
        "plain": "plain", "CutMix": "CutMix", "mixup": "mixup", EACH: EACH,
        longer: "mixup, for as long as the preset", MIXED: '**`preset("accuracy")`**',
    }  # fmt: skip
    body = []
    for name, shown in names.items():
        cells = [_interval(table[name]["accuracy"]) for table in tables]
        times = [table[name]["time"] for table in tables if table[name]["time"]]
        body.append([shown, *cells, _range(times)])
    for rival in ("mixup", EACH, longer):
        gains = [_interval(table[MIXED][f"over {rival}"], "+") for table in tables]
        shorter = names[rival].removesuffix(" as the preset")
        body.append([f"the preset over {shorter}", *gains, ""])
    labels = [f">{int(count):,} labels" for count in result["table"]]
    shown_runs = [one for one in result["runs"] if one["row"] in names]
    note = f"{_note({**result, 'runs': shown_runs})} Time of a training, against a plain one."
    return markdown(["", *labels, ">time"], body, note)


def preset_table() -> str:
    """What the preset is ahead with few labels, on both data, on two cores and on a GPU."""
    head = ["data", ">labels", "on", "over mixup", "for the same time", f"over {EACH}"]
    rows = []
    for title, name in (("CIFAR-10", "cifar10"), ("Fashion-MNIST", "fashion-mnist")):
        results = {"two cores": load(f"lowdata-{name}"), "a GPU": load(f"lowdata-{name}-gpu")}
        for labels in results["two cores"]["table"]:
            for where, result in results.items():
                row = result["table"][labels][MIXED]
                rivals = [rival.format(MIXED) for rival in _RIVALS_OF_PRESET]
                gains = [_interval(row.get(f"over {rival}"), "+") for rival in rivals]
                rows.append([title, f"{int(labels):,}", where, *gains])
    return markdown([*head, "for the same time"], rows)


_RIVALS_OF_PRESET = (
    "mixup", "mixup, for as long as {}", EACH, f"{EACH}, for as long as {{}}",
)  # fmt: skip


def _range(values: Sequence[float]) -> str:
    """The least and the largest."""
    ends = [f"{value:.1f}" for value in (min(values), max(values))] if values else []
    return "–".join(dict.fromkeys(ends))


def augmentations_table() -> str:
    """Accuracy with every augmentation and few labels, on a GPU."""
    rivals = {
        "plain": "plain", "mixup": "mixup", EACH: EACH,
        "mixup for as long": "mixup, for as long as {}",
        f"{EACH}, for as long": f"{EACH}, for as long as {{}}",
    }  # fmt: skip
    return _study(load("lowdata-cifar10-gpu"), ">labels", rivals)


def fashion_table(name: str) -> str:
    """Accuracy with few labels of Fashion-MNIST."""
    each = {EACH: EACH} if name.endswith("gpu") else {}
    longer = {"mixup for as long": "mixup, for as long as {}"}
    return _study(load(name), ">labels", {"mixup": "mixup", **each, "CutMix": "CutMix", **longer})


def finetune_table() -> str:
    """Accuracy after a little more training, at equal steps and at equal time."""
    return _finetunings("finetune-cifar10", "10000")


def finetune_gpu_table() -> str:
    """The same with a ResNet-18 of full width."""
    return _finetunings("finetune-cifar10-gpu", "48000")


def _finetunings(name: str, task: str) -> str:
    """With the accuracy before one of the tasks."""
    result = load(name)
    before = next(one["before"] for one in result["runs"] if one["setting"] == task)
    return _study(result, "task", _RIVALS, f' ("{task}": {before:.1f} before)')


def few_images_table() -> str:
    """New classes from very few images, against the label and away from the prediction."""
    names = {"CIFAR-10": "cifar10", "Fashion-MNIST": "fashion-mnist"}
    found = {title: load(f"finetune-few-{name}") for title, name in names.items()}
    first = next(iter(found.values()))
    table = {name: result["table"]["few"] for name, result in found.items()}
    for rows in table.values():
        for name, row in rows.items():
            row["over its twin"] = row.get(f"over {name.replace('OM', 'latent step')}")
    runs = [one for result in found.values() for one in result["runs"]]
    rivals = {"plain": "plain", "mixup": "mixup", "the same from the prediction": "its twin"}
    tested = "5,000 training images that nothing was learnt from"
    return _study({**first, "table": table, "runs": runs, "tested": tested}, "data", rivals)


_RIVALS = {
    "plain": "plain", "plain for as long": "plain, for as long as {}",
    "mixup for as long": "mixup, for as long as {}",
}  # fmt: skip


def corruptions_table(name: str = "finetune-cifar10") -> str:
    """Accuracy on corrupted images after a little more training."""
    result = load(name)
    head = ["task", "augmentation", "clean", "over plain", "corrupted", "over plain", ">seeds"]
    rows = []
    for title, table in result["table"].items():
        for row_name, row in table.items():
            if "corruptions" in row:
                over = [row.get(f"{what}over plain") for what in ("", "corruptions ")]
                clean, corrupted = (_interval(gain, "+") for gain in over)
                means = [_interval(row[what]) for what in ("accuracy", "corruptions")]
                seeds = str(len(row["seeds"]))
                rows.append([title, row_name, means[0], clean, means[1], corrupted, seeds])
    return markdown(head, rows, _note(result))


def _study(
    result: Mapping[str, Any],
    setting: str,
    rivals: Mapping[str, str],
    told: str = "",
) -> str:
    """The table of a study: accuracy, what it is over its rivals, what it took."""
    over = [f"over {rival}" for rival in rivals]
    head = [setting, "augmentation", "accuracy", *over, ">seeds", ">steps", ">passes", ">time"]
    body = []
    for title, table in result["table"].items():
        for name, row in sorted(table.items(), key=lambda item: item[1]["time"] or math.inf):
            gains = [row.get("over " + rival.format(name)) for rival in rivals.values()]
            cells = [_interval(gain, "+") for gain in gains]
            passes = row["passes"] / table["plain"]["passes"]
            ratios = ["" if cost is None else f"{cost:.2f}" for cost in (passes, row["time"])]
            taken = [str(len(row["seeds"])), str(row["steps"]), *ratios]
            body.append([title, name, _interval(row["accuracy"]), *cells, *taken])
    cost = "Passes: images through the network, the attack's too; they and time against plain."
    if any("for as long" in rival for rival in rivals):
        cost += ' "For as long": trained for as long as the row took.'
    if any("from the prediction" in rival for rival in rivals):
        cost += ' "From the prediction": the same row whose step leaves that, not the label.'
    return markdown(head, body, f"{_note(result, told)} {cost}")


def _note(result: Mapping[str, Any], told: str = "") -> str:
    usual, others = _machines_of(result)
    graphs = (
        "each step a CUDA graph (but the blends of mixup and CutMix), its time that of the step "
        "alone"
    )
    how = graphs if _on_gpu(usual) else "one thread"
    validated = "the validation images that chose the setting"
    tested = result.get("tested", validated) if min(result["seed"]) >= 100 else ""
    measured = f"Accuracy in % of {tested}" if tested else "Test accuracy in % of the last epoch"
    return (
        f"{measured}{told}, "
        "means with their 95 % intervals; differences are paired by seed. "
        f"{usual}, {how}{others}, {result['date']}."
    )


def _machines_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """The machine that made most runs of a study, and how many the others made."""
    runs = result["runs"]
    counts = Counter(one.get("hardware", result["hardware"]) for one in runs)
    (usual, _), *others = counts.most_common()
    told = (f" ({count} of the {len(runs)} trainings: {name})" for name, count in others)
    return usual, "".join(told)


def _on_gpu(hardware: str) -> bool:
    return "NVIDIA" in hardware


def _interval(found: tuple[float, float | None] | None, sign: str = "") -> str:
    if found is None:
        return ""
    mean, half = found
    return format(mean, f"{sign}.1f") + ("" if half is None else f" ± {half:.1f}")


def pyramid_sentence() -> str:
    """Cost of the manifold at 224 pixels."""
    result = load("speed-pyramid-cpu")
    share = {name: f"{100 * r['median']:.1f} %" for name, r in result["ratios"].items()}
    tiles = next(name for name in share if "Tiles" in name)
    return (
        f"At {result['size']} pixels a gradient through the pyramid costs "
        f"{share['Pyramid, gradient']} of a ResNet-50's forward and backward pass, all of a linear "
        f"step {share['Pyramid, a linear step']}; a gradient through {tiles.split(',')[0].lower()} "
        f"{share[tiles]} ({machine(result)}: "
        "[`benchmarks/speed/pyramid.py`](../benchmarks/speed/pyramid.py))."
    )


def robustness_tables() -> str:
    """Accuracy under every threat, of networks with and without the augmentation."""
    found = []
    for name, title in _EVALUATED.items():
        result = load(f"robustness-{name}")
        found.append(markdown(*_threats(title, result["tables"]), _threats_note(result, "plain")))
    return "\n\n".join(found)


def training_tables() -> str:
    """Accuracy under every threat, of adversarial trainings with and without the joint space."""
    result = load("robustness-training")
    found = []
    for base, tables in result["tables"].items():
        head, rows = _threats(base, tables)
        for threat, _, *cells in _threats(base, result["gentle"][base])[1]:
            if threat.startswith("worst case of the unseen"):
                rows.append([threat, "half of these budgets", *cells])
        for name in ("best", "last"):
            left = [result["autoattack"][row].get(name) for row in tables]
            epochs = ["" if one is None else f"{one:.1f}" for one in left]
            rows.append([f"AutoAttack L∞, {name} epoch", "4/255", *epochs])
        trainings = [result["trainings"][row] for row in tables]
        if _on_gpu(trainings[0]["hardware"]):  # on a CPU other work beside it counts too
            times = [_times(one, trainings[0]) for one in trainings]
            rows.append(["time of the training", "", *times])
        found.append(markdown(head, rows))
    return "\n\n".join(found) + "\n\n" + _threats_note(result, "the training of the first column")


def _times(training: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """How much longer it took, if on the same hardware."""
    if training["hardware"] != first["hardware"]:
        return ""
    return f"{training['seconds'] / first['seconds']:.2f}"


def _threats(title: str, tables: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in zip(*tables.values(), strict=True):
        if row[0]["part"].startswith("Corruptions") and "mean" not in row[0]["threat"]:
            continue
        threat = row[0]["threat"].partition(" (mCE")[0]
        threat += " corruptions" if threat.startswith("mean") else ""
        cells = [f"{r['accuracy']:.1f} ({r['change']})".replace(" ()", "") for r in row]
        rows.append([threat, row[0]["budget"], *cells])
    return [title, "budget", *(f">{who}" for who in tables)], rows


def _threats_note(result: Mapping[str, Any], against: str) -> str:
    return (
        f"Accuracy in % on {result['images']} test images, one training each (seed "
        f"{result['seed']}); in brackets the change against {against} on the same images and its "
        f"95 % interval, on the longer side. {result['hardware']}, {result['date']}: "
        f"`{result['command']}`."
    )


_EVALUATED = {"digits": "digits", "cifar10": "CIFAR-10, 5,000 images to learn from"}

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "cost": cost_table,
        "few": few_table,
        "flows": flows_table,
    },
    "docs/methods.md": {"preset": preset_table},
    "docs/speed.md": {
        "attack": attack_table,
        "pyramid": pyramid_sentence,
        "shapes": shapes_table,
        "speed": speed_table,
        "step": step_table,
        "step-gpu": gpu_step_table,
        "strength": strength_table,
    },
    "docs/studies.md": {
        "augmentations": augmentations_table,
        "corruptions": corruptions_table,
        "corruptions-gpu": partial(corruptions_table, "finetune-cifar10-gpu"),
        "corruptions-tuning": partial(corruptions_table, "finetune-tuning-gpu"),
        "corruptions-tuning-split": partial(corruptions_table, "finetune-tuning-split-gpu"),
        "fashion": partial(fashion_table, "lowdata-fashion-mnist"),
        "fashion-gpu": partial(fashion_table, "lowdata-fashion-mnist-gpu"),
        "few-images": few_images_table,
        "finetune": finetune_table,
        "finetune-gpu": finetune_gpu_table,
        "lowdata": lowdata_table,
        "robustness": robustness_tables,
        "training": training_tables,
    },
}


def render(document: str) -> str:
    """A document with every table between its markers renewed."""
    text = (ROOT / document).read_text()
    for name, table in TABLES[document].items():
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
        places = re.findall(pattern, text, flags=re.S)
        if len(places) != 1:
            raise SystemExit(f"{document} has {len(places)} places for the table {name!r}.")
        before, after = re.split(pattern, text, flags=re.S)
        text = f"{before}{table()}\n{after}"
    return text


if __name__ == "__main__":
    for written in TABLES:
        (ROOT / written).write_text(render(written))
