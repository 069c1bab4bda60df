"""A comparison as one page that needs nothing else: the answer first, then curves, the budget and every number."""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from transformer_jax.page import Column, Line, chart, document, key_of, short, table

QUALITY = ("loss", "exact match", "BLEU", "chrF")  # columns of the first table; the second is of costs


def columns_of(result: dict[str, Any]) -> list[Column]:
    """What is compared."""
    arms = result["arms"]

    def of(name: str, read: Callable[[Any], Any], show: Callable[[float], str], more: bool | None) -> Column:
        found = {arm: [read(run) for run in each["runs"].values() if "scores" in run] for arm, each in arms.items()}
        return Column(name, {arm: [v for v in values if v is not None] for arm, values in found.items()}, show, more)

    def fixed(name: str, field: str, more: bool | None = None) -> Column:
        return Column(name, {arm: [each[field]] for arm, each in arms.items()}, short, more)

    columns = [
        of("loss", lambda run: run["scores"]["loss"], lambda value: f"{value:.4f}", False),
        of("exact match", lambda run: run["scores"].get("exact_match"), lambda value: f"{value:.1%}", True),
        of("BLEU", lambda run: run["scores"].get("bleu"), lambda value: f"{value:.1f}", True),
        of("chrF", lambda run: run["scores"].get("chrf"), lambda value: f"{value:.1f}", True),
        fixed("parameters", "parameters"),
        fixed("steps", "steps"),
        fixed("FLOPs", "training_flops"),
        fixed("tokens/s", "tokens_per_second", True),
        fixed("bytes", "memory", False),
    ]
    for length in sorted({int(length) for each in arms.values() for length in each["latency"]}):
        times = {arm: [1e3 * each["latency"].get(str(length), math.nan)] for arm, each in arms.items()}
        columns.append(Column(f"{length} tokens", times, lambda value: f"{value:.1f} ms", False))
    return [column for column in columns if any(column.values.values())]


def quality_of(columns: Sequence[Column]) -> Column | None:
    """What arms are judged by: outputs where there are any, else the loss; None where no run came to its end."""
    named = {column.name: column for column in columns}
    return named.get("exact match") or named.get("loss")


def answer(result: dict[str, Any], columns: Sequence[Column]) -> str:
    """The comparison in a sentence: which arm is ahead, and whether by more than its seeds differ."""
    quality = quality_of(columns)
    means = {arm: statistics.fmean(values) for arm, values in quality.values.items() if values} if quality else {}
    if quality is None or len(means) < 2:
        return "Fewer than two arms were trained to their end: there is nothing to compare."
    first, second, *_ = sorted(means, key=lambda arm: means[arm], reverse=bool(quality.more))
    best, next_best = quality.values[first], quality.values[second]
    apart = min(best) > max(next_best) if quality.more else max(best) < min(next_best)
    by = "every seed of it is ahead of every seed of the next" if apart else "but the seeds of both overlap"
    shown = f"{quality.show(means[first])} against {quality.show(means[second])} of {second}"
    better = "better" if len(means) == 2 else "best"
    return f"With equal {result['match']}, {first} has the {better} {quality.name}: {shown}; {by}. {costs(result)}"


def costs(result: dict[str, Any]) -> str:
    """What the arms take, in a sentence: FLOPs of training, and time to decode the most tokens."""
    arms = result["arms"]

    def ratio(what: str, values: dict[str, float]) -> str:
        least, most = min(values, key=lambda arm: values[arm]), max(values, key=lambda arm: values[arm])
        return f"{least} takes the least {what}, {most} {values[most] / values[least]:.2g} times as much"

    found = [ratio("FLOPs of training", {arm: each["training_flops"] for arm, each in arms.items()})]
    lengths = set.intersection(*(set(map(int, each["latency"])) for each in arms.values()))
    if lengths:
        length = max(lengths)
        times = {arm: each["latency"][str(length)] for arm, each in arms.items()}
        found.append(ratio(f"time to decode {length} tokens", times))
    return "; ".join(found) + "."


def page(result: dict[str, Any]) -> str:
    """The page."""
    columns, arms = columns_of(result), list(result["arms"])

    def lines(field: str, scale: Callable[[Any], float]) -> list[Line]:
        found = []
        for arm, each in result["arms"].items():
            curves = [run["curve"] for run in each["runs"].values() if "curve" in run]
            points = [
                (scale(each) * group[0]["step"], [point[field] for point in group])
                for group in zip(*curves, strict=False)
                if all(point.get(field) is not None for point in group)
            ]
            found.append(Line(arm, points))
        return found

    axes = (
        ("steps", lambda each: 1.0),
        ("FLOPs", lambda each: each["flops_per_step"]),
        ("seconds", lambda each: each["seconds_per_step"]),
    )
    charts = [
        chart(f"{what} on unseen data", across, up, lines(field, scale))
        for field, what, up in (("loss", "Loss", "nats a token"), ("exact_match", "Exact match", "share of outputs"))
        for across, scale in axes
    ]
    shapes = "".join(
        f"<tr><td>{html.escape(arm)}</td><td>{each['encoder_layers']}</td><td>{each['decoder_layers']}</td>"
        f"<td>{each['d_model']}</td><td>{each['d_ff']}</td><td>{each['parameters']:,}</td>"
        f"<td>{html.escape(', '.join(str(value) for value in each['choices'].values()))}</td></tr>"
        for arm, each in result["arms"].items()
    )
    failures = "".join(
        f"<li>{html.escape(arm)}, seed {html.escape(seed)}: {html.escape(run['error'])}</li>"
        for arm, each in result["arms"].items()
        for seed, run in each["runs"].items()
        if "error" in run
    )
    title = f"{result['recipe']}: {' against '.join(arms)}"
    body = f"""<h1>{html.escape(result["recipe"])}: {html.escape(" · ".join(arms))}</h1>
<p class="answer">{html.escape(answer(result, columns))}</p>
{table([column for column in columns if column.name in QUALITY], arms)}
{table([column for column in columns if column.name not in QUALITY], arms)}
<p><small>{len(result["seeds"])} seeds; mean ± half the spread. Scores are of unseen data, loss of target tokens,
outputs greedy. FLOPs are those of training, bytes those of a step, the last columns times to decode so many tokens for
one prompt. Speeds are medians on this machine ({html.escape(result["device"])}),
measured before training with nothing beside.</small></p>
{f"<h2>What failed</h2><ul>{failures}</ul>" if failures else ""}
<h2>Learning curves</h2><p>{key_of(arms)}</p><div class="charts">{"".join(charts)}</div>
<h2>The budget</h2>
<p>A layer of an encoder, or of a decoder alone, has 4 d² + 2 d·ff parameters; one of a decoder with cross-attention
8 d² + 2 d·ff. So with ff = 4 d, equal parameters need L = L<sub>e</sub> + 4/3 L<sub>d</sub> layers. Here layers are
chosen so, and then ff, until the models are of one size, embeddings included:</p>
<div class="wide"><table><tr><th>arm</th><th>encoder layers</th><th>decoder layers</th><th>d</th><th>ff</th>
<th>parameters</th><th>choices</th></tr>{shapes}</table></div>
<p><small><code>{html.escape(result["command"])}</code>; transformer_jax
{html.escape(result["versions"]["transformer_jax"])}, jax {html.escape(result["versions"]["jax"])}.</small></p>"""
    return document(title, body)
