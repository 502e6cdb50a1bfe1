"""Draws an ablation as SVG: differences with intervals (a forest plot), and curves with a band, a thin line a seed."""

import io
from typing import Any

import numpy as np

from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.results import Results, curve, full_name

INK, MUTED, GRID = "#1d2733", "#5a6779", "#e6eaf0"
COLORS = ("#5a6779", "#2f6fb5", "#c2571a", "#1a7f4b", "#8a3fa0", "#b3372b", "#00808a", "#8a6d00")
"""The baseline first."""
VERDICT_COLORS = {
    "better": "#1a7f4b",
    "worse": "#b3372b",
    "equivalent": "#2f6fb5",
    "undecided": "#8794a5",
    None: "#c5cdd8",
}
AXES = {
    "step": "steps", "total_tokens": "real tokens", "total_model_flops": "model FLOPs", "training_seconds": "seconds",
}  # fmt: skip


def plotting() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the charts need the extra: pip install 'oq2vl-jax[lab]'.") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "oq2vl_jax", "svg.fonttype": "none", "font.family": "sans-serif"}
    import matplotlib.pyplot as plt

    return plt


def forest(results: Results) -> str:
    """Returns the differences of the primary metric with their intervals; the band is what was said not to matter."""
    plt = plotting()
    plan = results.plan
    metric = full_name(plan, plan.ablation.metric)
    arms = [arm for arm, found in results.comparisons.items() if metric in found]
    figure, axis = plt.subplots(figsize=(7.4, 0.9 + 0.5 * max(1, len(arms))), layout="constrained")
    effect = plan.ablation.smallest_effect
    axis.axvspan(-effect, effect, color="#eef3f9", zorder=0)
    axis.axvline(0, color=MUTED, linewidth=1)
    for place, arm in enumerate(reversed(arms)):
        found = results.comparisons[arm][metric]
        word = found.verdict.word if found.verdict else None
        one, color = found.difference, VERDICT_COLORS[word]
        if one.low is not None:
            axis.plot([one.low, one.high], [place, place], color=color, linewidth=3, solid_capstyle="round")
        axis.plot([one.mean], [place], "o", color=color, markersize=8)
        axis.text(1.02, place, word or "no verdict", transform=axis.get_yaxis_transform(), va="center", color=color,
                  fontweight="bold")  # fmt: skip
    axis.set_yticks(range(len(arms)), list(reversed(arms)))
    axis.set_ylim(-0.6, max(1, len(arms)) - 0.4)
    better = "to the left" if plan.ablation.is_lower_better else "to the right"
    axis.set_xlabel(f"{metric}: difference from {plan.ablation.baseline}, better {better}", color=MUTED)
    dress(axis)
    return svg_of(figure)


def curves(results: Results, stage: str, x: str) -> str | None:
    """Returns the curves of a stage's held-out loss, or of its training loss; None if no cell has any."""
    from matplotlib.ticker import LogLocator, NullFormatter

    plt = plotting()
    plan = results.plan
    name = "held_out_loss" if any(f"{stage}:held_out_loss" in one.numbers for one in results.done) else "loss"
    figure, axis = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    lowest, num_drawn = np.inf, 0
    for arm, color in zip(plan.arms, COLORS * len(plan.arms), strict=False):
        found = [curve(one, stage, x, name) for one in results.of_arm(arm)]
        found = [pair for pair in found if len(pair[0]) > 1]
        for xs, ys in found:
            axis.plot(xs, ys, color=color, linewidth=0.7, alpha=0.35)
            lowest = min(lowest, ys.min())
        if not found:
            continue
        num_drawn += 1
        grid = np.linspace(max(xs[0] for xs, _ in found), min(xs[-1] for xs, _ in found), 200)
        values = np.stack([np.interp(grid, xs, ys) for xs, ys in found])
        axis.plot(grid, values.mean(0), color=color, linewidth=2, label=arm)
        if len(found) > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(
                grid, values.mean(0) - spread, values.mean(0) + spread, color=color, alpha=0.15, linewidth=0
            )
    if not num_drawn:
        plt.close(figure)
        return None
    if lowest > 0:
        axis.set_yscale("log")
        axis.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
    axis.set_xlabel(AXES[x], color=MUTED)
    axis.set_ylabel(f"{stage}: {name.replace('_', ' ')} (nats)", color=MUTED)
    axis.legend(frameon=False, fontsize=9)
    dress(axis)
    return svg_of(figure)


def dress(axis: Any) -> None:
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c5cdd8")


def svg_of(figure: Any) -> str:
    """Returns the figure as SVG that is the same every time."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"
