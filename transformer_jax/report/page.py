"""Histories of runs -> one page that needs nothing else: the answer first, then curves, samples, settings, the rest."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformer_jax.config import RunConfig
from transformer_jax.config_file import flat
from transformer_jax.page import Column, Line, chart, document, folded, key_of, short, table, thinned, words
from transformer_jax.recipes import RECIPES, find_recipe
from transformer_jax.report.history import History
from transformer_jax.report.samples import samples_of

EVENTS = 50  # of a run that are listed


class Metric(NamedTuple):
    """How a number of metrics.jsonl is drawn: its title, its unit, a factor, and whether on a logarithmic axis."""

    title: str
    unit: str = ""
    factor: float = 1.0
    log: bool = False


METRICS = {  # in the order of the page; others follow under their own names
    "loss": Metric("Loss", "nats a token", log=True),
    "exact_match": Metric("Outputs equal to target", "%", 100),
    "accuracy": Metric("Next token ranked first", "%", 100),
    "learning_rate": Metric("Learning rate"),
    "grad_norm": Metric("Norm of the gradient", log=True),
    "tokens_per_second": Metric("Speed", "tokens a second"),
    "data_wait": Metric("Time that batches were waited for", "%", 100),
}
TOLD = ("tokens", "compiles", "seconds", "perplexity", "exact_match_sample")  # in tables, or by another number


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _time(seconds: float) -> str:
    """`5.2 s`, `3m12s`, `2h05m`."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02}m" if hours else f"{int(seconds) // 60}m{int(seconds) % 60:02}s"


def _score(history: History) -> str:
    """The last and the best scores on validation data, in words."""
    parts = []
    for metric, what, show, more in (
        ("exact_match", "exact match", _percent, True),
        ("loss", "loss", lambda value: f"{value:.4f}", False),
    ):
        last, best = history.last("validation", metric), history.best(metric, more)
        if last and best:
            at = "its best" if best[0] == last[0] else f"at best {show(best[0])} at step {best[1]:,}"
            parts.append(f"{what} {show(last[0])} ({at})")
    return f"on unseen data {', '.join(parts)}" if parts else "not evaluated yet"


def _data(run: RunConfig) -> str:
    named = {"dates": "dates in many locales", "code": "the Python standard library"}
    paths = [*run.data.train, *run.data.mixture]
    return ", ".join(paths) if paths else named.get(run.data.embedded, "its data")


def _parameters(history: History) -> str:
    count = _fact(history, "parameters")
    return f"{count:,}" if isinstance(count, int) else ""


def _fact(history: History, name: str) -> Any:
    """What the last start of a run has on record."""
    starts = history.of_kind("start")
    return starts[-1].get(name) if starts else None


def summary(histories: Sequence[History]) -> str:
    """What was trained, on what, and how well, in a sentence or two."""
    if len(histories) == 1:
        (one,) = histories
        run = one.config
        size = f" with {count} parameters" if (count := _parameters(one)) else ""
        what = f"{run.model.mode}{size}, {run.data.objective}, on {_data(run)}"
        return f"{what}: {one.state}; {_score(one)}."
    found = {each.name: best for each in histories if (best := each.best("loss", more=False))}
    if len(found) < 2:
        return f"{len(histories)} runs, of which {len(found)} were evaluated."
    first, second = sorted(found, key=lambda name: found[name][0])[:2]
    said = f"{first} has the lowest loss on unseen data, {found[first][0]:.4f} at step {found[first][1]:,}"
    note = "" if len({_data(each.config) for each in histories}) == 1 else " They are not of one data set."
    return f"{said}, against {found[second][0]:.4f} of {second}.{note}"


def _metrics(histories: Sequence[History]) -> list[str]:
    """What is drawn, in order."""
    found = dict.fromkeys(metric for each in histories for _, metric in each.curves)
    return [name for name in METRICS if name in found] + [n for n in found if n not in METRICS and n not in TOLD]


def charts(histories: Sequence[History]) -> str:
    """A chart for each number: with a line for each part of the data, or of several runs one for each of them."""
    drawn = []
    splits = list(dict.fromkeys(split for each in histories for split in each.splits))

    def line(history: History, split: str, metric: str, name: str) -> Line:
        steps, values = history.curve(split, metric)
        factor = METRICS.get(metric, Metric(metric)).factor
        return Line(name, thinned(steps, [factor * value for value in values]))

    for metric in _metrics(histories):
        about = METRICS.get(metric, Metric(metric.replace("_", " ").capitalize()))
        if len(histories) == 1:
            lines = [line(histories[0], split, metric, split) for split in splits]
            drawn.append(chart(about.title, "steps", about.unit, lines, about.log))
            continue
        for split in splits:
            where = f", {split}" if metric in ("loss", "accuracy", "exact_match") else ""
            lines = [line(each, split, metric, each.name) for each in histories]
            drawn.append(chart(about.title + where, "steps", about.unit, lines, about.log))
    names = splits if len(histories) == 1 else [each.name for each in histories]
    return f'<p>{key_of(names)}</p><div class="charts">{"".join(drawn)}</div>'


def _column(name: str, histories: Sequence[History], read: Callable[[History], list[float]], show: Any) -> Column:
    return Column(name, {each.name: read(each) for each in histories}, show, None)


def scores(histories: Sequence[History]) -> str:
    """Each run's last scores, by part of the data."""
    names, parts = [each.name for each in histories], []
    splits = list(dict.fromkeys(split for each in histories for split in each.splits if split != "train"))
    for split in splits:
        columns = []
        for metric, name, show, more in (
            ("loss", "loss", lambda value: f"{value:.4f}", False),
            ("perplexity", "perplexity", lambda value: f"{value:.4g}", False),
            ("accuracy", "next token", _percent, True),
            ("exact_match", "exact match", _percent, True),
        ):
            found = {each.name: each.last(split, metric) for each in histories}
            if any(found.values()):
                columns.append(Column(name, found, show, more))
        steps = {each.name: list(each.curve(split, "loss")[0][-1:]) for each in histories}
        columns.append(Column("at step", steps, lambda value: f"{value:,.0f}", None))
        title = "" if len(splits) == 1 else f"<h3>{html.escape(split)}</h3>"
        parts.append(title + table(columns, names, "run", "–"))
    return "".join(parts)


def timings(histories: Sequence[History]) -> str:
    """What the runs took."""
    columns = [
        _column("tokens/s, median", histories, lambda each: each.median("train", "tokens_per_second"), short),
        _column("waits for data", histories, lambda each: each.median("train", "data_wait"), _percent),
        _column("compilations", histories, lambda each: each.last("train", "compiles"), lambda value: f"{value:.0f}"),
        _column("time on record", histories, lambda each: [each.seconds] if each.seconds else [], _time),
        _column("of it evaluation", histories, lambda each: each.total("seconds"), _time),
        _column("starts", histories, lambda each: [float(len(each.of_kind("start")))], lambda value: f"{value:.0f}"),
    ]
    return table(columns, [each.name for each in histories], "run", "–")


def hardware(histories: Sequence[History]) -> str:
    """Where the runs were trained, and with what, as their last starts say."""
    names = ("device", "devices", "processes", "platform", "machine", "python", "date", "commit")
    rows: dict[str, list[str]] = {"parameters": [_parameters(each) for each in histories]}
    for name in names:
        rows[name] = [str(_fact(each, name) or "") for each in histories]
    versions = [found if isinstance(found := _fact(each, "versions"), dict) else {} for each in histories]
    for name in dict.fromkeys(name for each in versions for name in each):
        rows[str(name)] = [str(each.get(name) or "") for each in versions]
    rows = {name: values for name, values in rows.items() if any(values)}
    if not any(each.of_kind("start") for each in histories):
        return "<p>Not on record: the run is older than the lines that say it.</p>"
    heads = ["", *(each.name for each in histories)]
    return words(heads, [[name, *(value or "–" for value in values)] for name, values in rows.items()])


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) or "–" if isinstance(value, tuple) else "–" if value in ("", None) else str(value)


def settings(histories: Sequence[History]) -> str:
    """What differs between the runs, or of one run from its recipe; then all of it on demand."""
    every = [flat(each.config) for each in histories]
    heads = ["setting", *(each.name for each in histories)]
    if len(histories) == 1:
        recipe = histories[0].config.recipe
        known = recipe in RECIPES
        every.append(flat(find_recipe(recipe) if known else RunConfig()))
        heads.append(f"recipe {recipe}" if known else "default")
    rows = [[name, *(_setting(each[name]) for each in every)] for name in every[0]]
    differ = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "workdir"]
    said = words(heads, differ) if differ else "<p>None differs.</p>"
    count = len(histories)
    return said + folded("All settings", words(heads[: count + 1], [row[: count + 1] for row in rows]))


def events(history: History) -> str:
    """What happened, in order."""
    lines = []
    for event in history.events:
        told = event.get("reason") or event.get("param_digest") or event.get("changes") or event.get("device") or ""
        told = "; ".join(map(str, told)) if isinstance(told, list) else str(told)
        what = event["event"].replace("_", " ")
        lines.append(f"<li>step {event['step']:,}: {html.escape(what)}{': ' * bool(told)}{html.escape(told)}</li>")
    if history.damaged:
        lines.append(f"<li>{history.damaged:,} damaged lines of metrics.jsonl are left out.</li>")
    earlier, latest = lines[:-EVENTS], lines[-EVENTS:]
    more = folded(f"{len(earlier):,} earlier ones", f"<ul>{''.join(earlier)}</ul>") if earlier else ""
    return f"{more}<ul>{''.join(latest)}</ul>"


def data(history: History) -> str:
    """What the run said of its data and model as it started."""
    told = _fact(history, "report")
    lines = "".join(f"<li>{html.escape(str(line))}</li>" for line in told) if isinstance(told, list) else ""
    return f"<ul>{lines}</ul>" if lines else ""


def page(histories: Sequence[History], looked: Mapping[str, tuple[str, str]]) -> str:
    """The page. `looked` has, by run, what was asked and its attention, or why there is none."""

    def each_of(show: Callable[[History], str]) -> str:
        if len(histories) == 1:
            return show(histories[0])
        return "".join(f"<h3>{html.escape(each.name)}</h3>{show(each)}" for each in histories)

    def attention(history: History) -> str:
        asked, drawn = looked[history.name]
        return f"<p>Prompt: {html.escape(asked)}.</p>{drawn}" if asked else f"<p>{html.escape(drawn)}</p>"

    names = [each.name for each in histories]
    title = f"{histories[0].config.recipe}: {names[0]}" if len(names) == 1 else " · ".join(names)
    title = title if len(title) < 100 else f"{len(names)} runs"
    body = [
        f'<h1>{html.escape(title)}</h1><p class="answer">{html.escape(summary(histories))}</p>',
        scores(histories),
        f"<h2>Curves</h2>{charts(histories)}",
        f"<h2>Samples</h2>{each_of(samples_of)}",
        f"<h2>Attention</h2>{each_of(attention)}" if looked else "",
        f"<h2>Settings</h2>{settings(histories)}",
        f"<h2>Timings</h2>{timings(histories)}",
        f"<h2>Hardware and versions</h2>{hardware(histories)}",
        f"<h2>Data and model</h2>{each_of(data)}" if any(data(each) for each in histories) else "",
        f"<h2>Events</h2>{each_of(events)}",
    ]
    return document(title, "\n".join(body))
