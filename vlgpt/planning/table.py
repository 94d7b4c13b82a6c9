"""A plan as text, with the reasoning in words."""

from __future__ import annotations

from vlgpt.files import JsonObject

GIB = 1 << 30


def to_text(plan: JsonObject) -> str:
    """Several small tables; widths fit a terminal of 100 columns."""
    hardware, schedule, flops = plan["hardware"], plan["schedule"], plan["flops"]
    num_gpus = hardware["nodes"] * hardware["gpus_per_node"]
    lines = [f"{plan['run']} on {num_gpus} GPUs of {hardware['gpu_memory_bytes'] / GIB:g} GiB", ""]
    lines += [f"{'parameters':32}{'all':>16}{'trained':>16}"]
    for name, counts in plan["parameters"]["components"].items():
        lines.append(f"  {name:30}{counts['count']:>16,}{counts['trainable']:>16,}")
    lines.append(f"  {'together':30}{plan['parameters']['total']:>16,}{plan['parameters']['trainable']:>16,}")
    lines += ["", "GiB per GPU (ZeRO-2, the configured micro-batch)"]
    lines += [f"  {name.removesuffix('_bytes'):30}{n / GIB:>16.2f}" for name, n in plan["memory"].items()]
    lines += ["", f"{'layout':24}{'checkpointing':>14}{'micro-batch':>12}{'accumulation':>13}{'GiB':>8}"]
    for found in plan["layouts"]:
        words = "yes" if found["has_checkpointing"] else "no"
        micro = found["micro_batch"] or "none fits"
        size = found["needed_bytes"] / GIB
        name, steps = found["ds_config"].removeprefix("ds_configs/"), found["accumulation"]
        lines.append(f"  {name:22}{words:>14}{micro:>12}{steps:>13}{size:>8.1f}")
    lines += ["", _advice(plan), ""]
    lines.append(
        f"{flops['per_step']:.3g} FLOPs a step ({flops['per_sample']:.3g} a sample, {flops['recomputed_per_step']:.3g} "
        f"more for recomputation); {schedule['steps']:,} steps, {schedule['samples']:,} samples, "
        f"{schedule['positions']:,} positions (tokens and visual embeddings)"
    )
    lines.append(f"{schedule['seconds_per_step']:.1f} s a step, {schedule['hours']:,.1f} hours in all")
    lines += [f"{name.replace('_', ' ')}: {n / 1e9:,.1f} GB" for name, n in plan["disk"].items()]
    return "\n".join([*lines, "", "Assumed:", *(f"- {text}" for text in plan["assumptions"])])


def _advice(plan: JsonObject) -> str:
    """Why this layout, in words."""
    best = plan["recommended"]
    if best is None:
        smallest = min(found["needed_bytes"] for found in plan["layouts"]) / GIB
        return (
            f"Nothing fits: even a micro-batch of 1 needs {smallest:.1f} GiB, or the global batch cannot be divided by "
            "the number of GPUs. Take larger or more GPUs, or a smaller model."
        )
    how, room = "with" if best["has_checkpointing"] else "without", plan["hardware"]["gpu_memory_bytes"] / GIB
    plain = best["ds_config"].endswith(("zero1.json", "zero2.json"))
    why = (
        "the frozen weights fit whole on every GPU, so nothing has to be gathered"
        if plain
        else "the simpler layouts leave no room for a micro-batch as large"
    )
    return (
        f"Take {best['ds_config']} {how} checkpointing, micro_batch={best['micro_batch']} "
        f"(accumulation {best['accumulation']}), {best['needed_bytes'] / GIB:.1f} of {room:g} GiB: {why}."
        f"{_alternatives(plan, best)}"
    )


def _alternatives(plan: JsonObject, best: JsonObject) -> str:
    """Why neither the other checkpointing nor ZeRO-3."""
    words = ""
    for found in plan["layouts"]:
        micro, is_same = found["micro_batch"], found["ds_config"] == best["ds_config"]
        if is_same and best["has_checkpointing"] and not found["has_checkpointing"]:
            most = f"no more than micro_batch={micro} fits" if micro else "not even one row fits"
            words += f" Without checkpointing {most}: the activations of all layers stay in memory."
        is_larger = micro > best["micro_batch"] and found["has_checkpointing"] == best["has_checkpointing"]
        if is_larger and found["ds_config"].endswith("zero3.json"):
            words += f" ZeRO-3 would fit micro_batch={micro}, but gathers all weights in every pass."
    return words
