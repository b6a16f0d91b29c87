"""Draw the figures of the benchmarks and print the table of the cost page, from the files in results/.

    python examples/benchmarks/plot.py                  # a PNG beside each CSV that is there
    python examples/benchmarks/plot.py table            # the cost page's table, in Markdown
    python examples/benchmarks/plot.py table --model smollm2

Colours are Okabe and Ito's, and each line has its own dashes and marker, so that grey prints can be read. Where a file
holds rows of several machines, those of the last one are shown.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from measure import RESULTS, read

LOOKS = {  # method -> its name in figures, its color and dashes in all of them (None: gray)
    "lora": ("LoRA", None), "lora again": ("LoRA, once more", None), "flat": ("Flat-LoRA (ours)", 0),
    "add and remove": ("add and remove", 1), "two passes": ("two passes (SAM)", 2),
    "c": ("C kernel (ours)", 0), "triton": ("Triton kernel (ours)", 4), "torch": ("torch's generator (ours)", 5),
    "normal+add": ("normal_ and add", 1), "copy": ("copy of W", 2), "matmul": ("product, 512 tokens", 3),
}  # fmt: skip
Rows = list[dict[str, str]]


def newest(rows: Rows) -> Rows:
    """The rows that were made where the last one was."""
    return [row for row in rows if all(row.get(k) == rows[-1].get(k) for k in ("machine", "versions", "seed"))]


def where(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def values(rows: Rows, column: str) -> list:
    """Different values of a column, numbers in their order, words as they come."""
    found = list(dict.fromkeys(row[column] for row in rows))
    return sorted(found, key=float) if all(value.replace(".", "", 1).isdigit() for value in found) else found


def line(axes, rows: Rows, x: str, y: str, name: str, band: str | None = None, note: str = "",
         **changes: object) -> None:  # fmt: skip
    """One method's column over another column, with its interval; `changes` are to the look of its line."""
    from flatlora.plotting.style import look

    rows = sorted(rows, key=lambda row: float(row[x]))
    if not rows:
        return
    text, k = LOOKS.get(name, (name, 3))
    style = look(k or 0, "light") | ({"color": "#777777", "linestyle": ":"} if k is None else {})
    at = [float(row[x]) for row in rows]
    if band:
        low, high = ([float(row[f"{band} {side}"]) for row in rows] for side in ("low", "high"))
        axes.fill_between(at, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(at, [float(row[y]) for row in rows], label=text + note, **style | changes)


def panels(count: int, width: float = 4.2, height: float = 3.6, rows: int = 1):
    from flatlora.plotting.style import new_figure

    return new_figure("light", (width * count, height * rows), None, nrows=rows, ncols=count, squeeze=False)


def label(axes, title: str, x: str, y: str, ticks: Iterable[str] = ()) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    if ticks := list(ticks):
        axes.set_xscale("log", base=2)
        axes.set_xticks([float(tick) for tick in ticks], ticks)
        axes.minorticks_off()


def finish(figure, axes, columns: int = 4) -> None:
    """One legend for all panels, in at most so many columns."""
    handles = {}
    for panel in axes.flat:
        handles |= {text: handle for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = min(columns, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=3)


def step_grid(rows: Rows, column: str, band: str | None, title: str, level: float):
    """A panel per dtype and checkpointing, over the tokens per step, at the rank measured most; LoRA is at `level`."""
    rows = where(rows, model=rows[0]["model"])
    rank = max(values(rows, "r"), key=lambda r: len(where(rows, r=r)))
    rows = where(rows, r=rank)
    kinds, modes = values(rows, "dtype"), values(rows, "checkpointing")
    with panels(len(kinds), rows=len(modes)) as (figure, axes):
        for i, mode in enumerate(modes):
            for j, kind in enumerate(kinds):
                here = where(rows, dtype=kind, checkpointing=mode)
                for name in values(rows, "method"):
                    if name != "lora":
                        line(axes[i, j], where(here, method=name), "tokens", column, name, band)
                how = "with" if mode == "True" else "no"
                label(axes[i, j], f"{kind}, {how} checkpointing, r = {rank}", "tokens per step", title,
                      values(rows, "tokens"))  # fmt: skip
                axes[i, j].axhline(level, color="#999999", linewidth=0.8, zorder=0.5)
        finish(figure, axes)
    return figure


def step_time(rows: Rows):
    return step_grid(rows, "ratio", "ratio", "time of a step / plain LoRA", 1)


def with_memory(rows: Rows) -> Rows:
    """Add the difference (MiB) and the ratio of the peak memory to that of LoRA in the same configuration."""

    def configuration(row):
        return tuple(
            row[name] for name in ("model", "tokens", "length", "r", "dtype", "adapters", "checkpointing", "kind")
        )

    lora = {configuration(row): int(row["peak bytes"]) for row in rows if row["method"] == "lora"}
    peaks = [(row, int(row["peak bytes"]), lora[configuration(row)]) for row in rows]
    return [row | {"MiB": str((own - base) / 2**20), "memory ratio": str(own / base)} for row, own, base in peaks]


def step_memory(rows: Rows):
    return step_grid(with_memory(rows), "MiB", None, "peak memory beyond plain LoRA's, MiB", 0)


def step_cost(rows: Rows):
    """The README's figure: time and memory of a step over plain LoRA's, both dtypes, without checkpointing."""
    rows = where(with_memory(rows), model=rows[0]["model"], r="8", checkpointing="False")
    kinds = {"bf16": {"linestyle": "-"}, "fp32": {"linestyle": "--", "markerfacecolor": "white"}}
    columns = {"ratio": ("Time of a training step", "ratio"), "memory ratio": ("Peak memory of a training step", None)}
    with panels(2, width=4.6, height=3.8) as (figure, axes):
        for panel, (column, (title, band)) in zip(axes.flat, columns.items(), strict=True):
            for name, order in {"flat": 3, "add and remove": 2}.items():
                for kind, style in kinds.items():
                    changes = style | {"markeredgecolor": None, "zorder": order}
                    found = where(rows, method=name, dtype=kind)
                    line(panel, found, "tokens", column, name, band, f", {kind}", **changes)
            panel.axhline(1, color="#777777", linewidth=1.6, label="LoRA (peft)", zorder=1.5)
            label(panel, title, "tokens per step", "relative to LoRA", values(rows, "tokens"))
            panel.margins(x=0.08, y=0.12)
            panel.set_ylim(bottom=0)
        finish(figure, axes, columns=3)
    return figure


def step_rank(rows: Rows):
    rows = where(rows, model=rows[0]["model"], checkpointing="False")
    tokens = max(values(rows, "tokens"), key=lambda t: len({row["r"] for row in where(rows, tokens=t)}))
    rows = where(rows, tokens=tokens)
    kinds = values(rows, "dtype")
    with panels(len(kinds)) as (figure, axes):
        for j, kind in enumerate(kinds):
            for name in values(rows, "method"):
                if name != "lora":
                    line(axes[0, j], where(rows, dtype=kind, method=name), "r", "ratio", name, "ratio")
            label(axes[0, j], f"{kind}, {tokens} tokens", "rank", "time of a step / plain LoRA", values(rows, "r"))
            axes[0, j].axhline(1, color="#999999", linewidth=0.8, zorder=0.5)
        finish(figure, axes)
    return figure


def growth(rows: Rows):
    axis = {"size": "width", "layers": "layers", "threads": "threads"}
    kinds, sweeps = values(rows, "dtype"), [name for name in axis if where(rows, sweep=name)]
    with panels(len(sweeps), rows=len(kinds)) as (figure, axes):
        for i, kind in enumerate(kinds):
            for j, sweep in enumerate(sweeps):
                here = where(rows, sweep=sweep, dtype=kind)
                for name in values(here, "method"):
                    if name != "lora":
                        line(axes[i, j], where(here, method=name), axis[sweep], "extra ns", name, "extra")
                label(axes[i, j], f"{kind}, {sweep}", axis[sweep], "ns per weight over LoRA", values(here, axis[sweep]))
                axes[i, j].set_ylim(bottom=0)
        finish(figure, axes)
    return figure


def drift(rows: Rows):
    kinds = values(rows, "dtype")
    with panels(len(kinds), rows=2, height=3) as (figure, axes):
        for j, kind in enumerate(kinds):
            for name in values(rows, "method"):
                here = where(rows, dtype=kind, method=name)
                line(axes[0, j], here, "steps", "changed share", name)
                line(axes[1, j], here, "steps", "relative norm", name)
            label(axes[0, j], kind, "steps", "share of weights changed")
            label(axes[1, j], "", "steps", r"$\|W - W_0\|\,/\,\|W_0\|$")
            for panel in axes[:, j]:
                panel.set_xscale("log")
        finish(figure, axes)
    return figure


def noise(rows: Rows):
    """ns per weight over the number of weights, a panel per dtype that every size has."""
    threads = values(rows, "threads")
    kinds = [kind for kind in ("bf16", "fp32") if where(rows, dtype=kind)]
    rows = [row | {"weights": str(int(row["m"]) * int(row["n"]))} for row in rows if row["contestant"] != "reference"]
    with panels(len(kinds), rows=len(threads)) as (figure, axes):
        for i, count in enumerate(threads):
            for j, kind in enumerate(kinds):
                here = where(rows, dtype=kind, threads=count)
                for name in values(here, "contestant"):
                    line(axes[i, j], where(here, contestant=name), "weights", "median ns", name)
                label(axes[i, j], f"{kind}, {count} thread{'s' * (count != '1')}", "weights", "ns per weight")
                axes[i, j].set(xscale="log", yscale="log")
        finish(figure, axes)
    return figure


def roofline(rows: Rows):
    gpus = values(rows, "gpu")
    with panels(len(gpus)) as (figure, axes):
        for j, gpu in enumerate(gpus):
            here = where(rows, gpu=gpu, dtype="bf16")
            line(axes[0, j], here, "tokens", "overhead, products at half", "flat")
            line(axes[0, j], here, "tokens", "add and remove, products at half", "add and remove",
                 note=" (bytes alone)")  # fmt: skip
            label(axes[0, j], f"{gpu}, bf16 (computed)", "tokens of a forward", "cost over the frozen products",
                  values(here, "tokens"))  # fmt: skip
            axes[0, j].set_yscale("log")
            axes[0, j].tick_params(axis="x", labelrotation=45)
        finish(figure, axes)
    return figure


FIGURES: dict[str, tuple[str, Callable]] = {  # picture -> its file, how
    "noise": ("noise", noise), "step_time": ("step", step_time), "step_memory": ("step", step_memory),
    "step_rank": ("step", step_rank), "step_cost": ("step", step_cost), "growth": ("growth", growth),
    "drift": ("drift", drift), "roofline": ("roofline", roofline),
}  # fmt: skip


def draw(folder: Path) -> list[Path]:
    """A PNG for each figure whose file is there."""
    made = []
    for name, (source, figure) in FIGURES.items():
        if rows := newest(read(folder / f"{source}.csv")):
            made.append(folder / f"{name}.png")
            figure(rows).savefig(made[-1])
    return made


def table(folder: Path, model: str, tokens: list[str], r: str) -> str:
    """The table of the cost page: time of a step over plain LoRA's, and memory beyond it, without checkpointing."""
    rows = where(newest(read(folder / "step.csv")), model=model, r=r, checkpointing="False")
    lines = []
    for kind in values(rows, "dtype"):
        for count in [t for t in tokens if where(rows, dtype=kind, tokens=t)]:
            here = {row["method"]: row for row in where(rows, dtype=kind, tokens=count)}
            methods = [name for name in values(rows, "method") if name not in ("lora", "lora again")]
            if not lines:
                heads = [f"{LOOKS.get(name, (name,))[0]} | memory" for name in methods]
                lines = ["| " + " | ".join(["dtype, tokens per step", "LoRA", *heads]) + " |"]
                lines += ["|---|" + "---:|" * (2 * len(methods) + 1)]
            lora, cells = here["lora"], []
            for name in methods:
                row = here.get(name)
                if row is None:
                    cells += ["", ""]
                    continue
                extra = (int(row["peak bytes"]) - int(lora["peak bytes"])) / 2**20
                cells += [f"{float(row['ratio']):.2f} [{float(row['ratio low']):.2f}, {float(row['ratio high']):.2f}]"]
                cells += [f"{extra:+.1f} MiB"]
            time = f"{float(lora['median s']):.2f} s, {int(lora['peak bytes']) / 2**20:.0f} MiB"
            lines.append("| " + " | ".join([f"{kind}, {count}", time, *cells]) + " |")
    if not lines:
        raise ValueError(f"{folder / 'step.csv'} has no rows of model {model!r} at r = {r}: run step.py first")
    made = f"{rows[0]['machine']}, {rows[0]['threads']} threads; {rows[0]['versions']}."
    how = "Median ratio to plain LoRA in the same round with its 95 % interval; peak of a step beyond plain LoRA's."
    return "\n".join([*lines, "", f"{made} {how}"])


def kinds(folder: Path) -> str:
    """The table of kinds of adapters and weights on the cost page: Flat-LoRA over plain LoRA of the same kind."""
    rows = where(newest(read(folder / "kinds.csv")), method="flat")
    counts = sorted(values(rows, "tokens"), key=int)
    lines = ["| " + " | ".join(["", *(f"{count} tokens | memory" for count in counts)]) + " |"]
    lines += ["|---|" + "---:|" * (2 * len(counts))]
    for kind in values(rows, "kind"):
        cells = [kind]
        for count in counts:
            row = where(rows, kind=kind, tokens=count)[0]
            lora = where(read(folder / "kinds.csv"), kind=kind, tokens=count, method="lora")[-1]
            cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*(float(row[n]) for n in ("ratio", "ratio low", "ratio high")))]
            cells += [f"{(int(row['peak bytes']) - int(lora['peak bytes'])) / 2**20:+.1f} MiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["plot", "table", "kinds"], default="plot")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", default="llama6")
    parser.add_argument("--tokens", nargs="+", default=["128", "512", "2048", "4096"], help="of the table")
    parser.add_argument("--r", default="8", help="of the table")
    options = parser.parse_args(arguments)
    if options.what == "table":
        print(table(options.results, options.model, options.tokens, options.r))
    elif options.what == "kinds":
        print(kinds(options.results))
    else:
        for path in draw(options.results):
            print(path)


if __name__ == "__main__":
    main()
