"""The table and the picture of what `data_statistics.measure` found."""

from pathlib import Path
from typing import Any

from data_statistics import NEAR


def table(found: dict[str, Any]) -> str:
    """A few lines for each question, as plain text."""
    rows = found["rows"]
    lines = [f"{', '.join(found['paths'])}: {rows} {found['kind']} ({found['source']})", ""]

    def line(name: str, *parts: str) -> None:
        lines.append(f"{name:<28}{'   '.join(parts)}".rstrip())

    def share(count: int, of: int) -> str:
        return f"{count} ({count / of:.1%})" if of else str(count)

    line("exchanges in a dialogue", *(f"{n}: {count}" for n, count in found["exchanges"].items()))
    for name, spread in found["lengths"].items():
        if spread is not None:
            line(
                f"{found['unit']}s in a {'turn before' if name == 'history' else name}", f"mean {spread['mean']:.1f}",
                f"median {spread['median']}", f"95% up to {spread['p95']}", f"longest {spread['longest']}",
            )  # fmt: skip
    for name in ("better_response_id", "safer_response_id", "answers", "pairs"):
        if name in found:
            total = sum(found[name].values())
            line(name, *(f"{key}: {share(count, total)}" for key, count in found[name].items() if count))
    if "both_asked" in found:
        asked = found["both_asked"]
        line("helpful and safe disagree", f"{share(found['disagree'], asked)} of {asked} pairs asked both")
        if found["safer_is_the_unsafe_one"]:
            line("safer id, but unsafe", share(found["safer_is_the_unsafe_one"], rows))
    if "red_team" in found:
        line("red-team prompts", share(found["red_team"], rows))
    for name, count in found.get("categories", {}).items():
        line(f"  harm: {name[:50]:<50}", str(count))
    duplicates = found["duplicates"]
    line("rows equal to another", share(duplicates["equal_rows"], rows))
    line("different first turns", str(duplicates["openings"]))
    near = share(duplicates["near_openings"], duplicates["openings"])
    line("of them nearly like another", near, f"(Jaccard {NEAR} of runs of five characters)")
    if "leaks" in found:
        leaks = found["leaks"]
        line("rows with a first turn of", leaks["against"])
        line("  the same words", share(leaks["same_opening"], rows))
        line("  nearly the same", share(leaks["near_opening"], rows))
    if found["notes"]:
        lines += ["", *found["notes"]]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Lengths, exchanges, labels and categories, as far as the kind has them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [_draw_lengths]
    if len(found["exchanges"]) > 1:
        panels.append(_draw_exchanges)
    if "both_asked" in found:
        panels.append(_draw_labels)
    if found.get("categories"):
        panels.append(_draw_categories)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        panel(found, axis)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['rows']} {found['kind']} ({found['source']})", fontsize=11)
    hidden = path.with_name(f".{path.name}")
    figure.savefig(hidden, dpi=110)
    hidden.replace(path)
    plt.close(figure)


def _draw_lengths(found: dict[str, Any], axis) -> None:
    for name, spread in found["lengths"].items():
        if spread is not None:
            parts = [count / spread["texts"] for count in spread["counts"]]
            edges = spread["edges"]
            axis.stairs(parts, range(len(edges)), label="turns before" if name == "history" else name, linewidth=1.6)
            axis.set_xticks(range(len(edges)), [str(edge) for edge in edges], rotation=45, fontsize=7)
    axis.set(xlabel=f"{found['unit']}s", ylabel="share of texts", title="lengths")
    axis.legend(frameon=False, fontsize=8)


def _draw_exchanges(found: dict[str, Any], axis) -> None:
    axis.bar([int(n) for n in found["exchanges"]], list(found["exchanges"].values()), color="tab:gray")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="exchanges, the prompt's included", ylabel="rows", title="dialogues")


def _draw_labels(found: dict[str, Any], axis) -> None:
    left = {"0": 0, "1": 0, "not asked": 0}
    bars = {"more helpful": found["better_response_id"], "safer": found["safer_response_id"]}
    disagree = found["disagree"]
    if found["both_asked"]:
        bars["helpful = safe?"] = {"0": found["both_asked"] - disagree, "1": disagree}
    for place, (name, counts) in enumerate(bars.items()):
        before = 0
        for key, color in zip(left, ("tab:blue", "tab:orange", "lightgray"), strict=True):
            count = counts.get(key, 0)
            axis.barh(place, count, left=before, color=color)
            if count:
                said = {"0": "agree", "1": "disagree"}.get(key, key) if name.endswith("?") else key
                axis.text(before + count / 2, place, said, ha="center", va="center", fontsize=8)
            before += count
    axis.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axis.set(xlabel="pairs", title="labels: which response?")


def _draw_categories(found: dict[str, Any], axis) -> None:
    most = list(found["categories"].items())[:19][::-1]
    axis.barh([name[:32] for name, _ in most], [count for _, count in most], color="tab:red")
    axis.tick_params(axis="y", labelsize=6)
    axis.set(xlabel="answers" if found["kind"] == "comparisons" else "prompts", title="harm")
