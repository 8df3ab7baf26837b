"""A result of `step.py` in lines of text."""

from typing import Any

from benchmarks.parts import PARTS
from gdfq.provenance import describe


def table(result: dict[str, Any]) -> str:
    lines = [f"One iteration, {heading(result)}", describe(result), "", *rows(result)]
    lines += ["", "first iteration: CE and BNS of G, CE and KL of Q, norms of the gradients of G and Q"]
    width = names_width(result)
    for provider, row in result["providers"].items():
        if row["first_iteration"]:
            figures = "  ".join(f"{value:11.6g}" for value in row["first_iteration"].values())
            lines.append(f"{provider:{width}} {figures}")
    return "\n".join(lines)


def heading(result: dict[str, Any]) -> str:
    """What was measured, in words."""
    arguments = result["arguments"]
    size = f", {arguments['image_size']} pixels" if arguments["image_size"] else ""
    done = max(len(row["samples_ms"]) for row in result["providers"].values())
    unfinished = "" if result["finished"] else f", unfinished: {done} of them"
    return (
        f"{arguments['model']}{size}, batch {arguments['batch']}, preset {arguments['preset']}, "
        f"W{arguments['bits']}A{arguments['bits']}, {arguments['precision']}, "
        f"{arguments['iterations']} rounds of {arguments['repeat']}{unfinished}"
    )


def rows(result: dict[str, Any]) -> list[str]:
    """Lines of text: times, memory and launches of every provider, how they ran, who was left out or computes
    something else, and the parts of an iteration where they are known."""
    on_gpu = result["machine"]["device"] != "cpu"
    width = names_width(result)
    memory, launches = ("peak GPU MB", "kernels") if on_gpu else ("peak RSS MB", "leaf calls")
    lines = [
        f"{'provider':{width}} {'median ms':>10} {'p20':>9} {'p80':>9} {'images/s':>9} {memory:>12} {launches:>10} "
        f"{'/ ours':>7}"
    ]
    for provider, row in result["providers"].items():
        count = next(iter((row["launches"] or {}).values()), None)
        lines.append(
            f"{provider:{width}} {row['ms']['median']:10.2f} {row['ms']['p20']:9.2f} {row['ms']['p80']:9.2f} "
            f"{row['images_per_second']:9.1f} {number(row['peak_memory_mb'], 12, 0)} {number(count, 10, 0)} "
            f"{number(result['ratio_to_ours'].get(provider), 7, 2)}"
        )
    backends: dict[str, list[str]] = {}
    for provider, row in result["providers"].items():
        backends.setdefault(row["backend"], []).append(provider)
    lines += [f"{', '.join(providers)}: {backend}" for backend, providers in backends.items()]
    lines += [f"disagrees: {words}" for words in disagreements_in_words(result)]
    lines += [f"skipped: {reason}" for reason in result["skipped"].values()]
    lines += [f"failed: {reason}" for reason in result["failed"].values()]
    with_parts = {provider: row for provider, row in result["providers"].items() if row["parts_ms"]}
    if with_parts:
        title = f"{'parts, ms, profiled':{width}} "
        lines += ["", title + "".join(f"{part:>12}" for part in PARTS) + f"{'sum':>10}{'of':>10}"]
    for provider, row in with_parts.items():
        times = row["parts_ms"].values()
        lines.append(
            f"{provider:{width}} " + "".join(f"{value:12.2f}" for value in times)
            + f"{sum(times):10.2f}{row['profiled_ms']:10.2f}"
        )  # fmt: skip
    return lines


def names_width(result: dict[str, Any]) -> int:
    return max(19, *map(len, result["providers"]))


def number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def disagreements_in_words(result: dict[str, Any]) -> list[str]:
    """A line for every provider that differs from the first one."""
    figures: dict[tuple[str, str], list[str]] = {}
    for item in result["disagreements"]:
        words = f"{item['figure']} {item['value']:.4g} for {item['expected']:.4g} (tolerance {item['tolerance']:g})"
        figures.setdefault((item["provider"], item["first"]), []).append(words)
    return [f"{provider} with {first}: {', '.join(words)}" for (provider, first), words in figures.items()]
