"""A trained run and a text -> where every head of every layer looks, as arrays and as one picture."""

import dataclasses
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from transformer_jax.axes import SCANNED
from transformer_jax.config import ModelConfig
from transformer_jax.data.load import prompts_of
from transformer_jax.data.objectives import TEXT_OBJECTIVES
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding import generate
from transformer_jax.errors import InputError, StorageError
from transformer_jax.evaluate import decoding_options
from transformer_jax.model.transformer import Transformer
from transformer_jax.run import Run
from transformer_jax.tokens import Tokens

# kind: (its title, the stack and the sublayer that it is of)
KINDS = {
    "encoder": ("Self-attention of the encoder", "encoder", "self_attention"),
    "self": ("Self-attention of the decoder", "decoder", "self_attention"),
    "cross": ("Cross-attention of the decoder to the encoder's output", "decoder", "cross_attention"),
}


class Maps(NamedTuple):
    """Attention of one kind.

    Attributes:
        kind: of KINDS.
        weights_NHTS: float32, what each query takes of each key, by layer and head; each query's sum is 1.
        queries: a label for each of the T tokens.
        keys: a label for each of the S tokens.
    """

    kind: str
    weights_NHTS: np.ndarray
    queries: list[str]
    keys: list[str]


def attention_of(model: Transformer, params: Any, target: Tokens, source: Tokens | None) -> dict[str, np.ndarray]:
    """The attention weights of one forward pass by kind, [N, B, H, T, S] each."""

    def forward(params: Any, target: Tokens, source: Tokens | None) -> Any:
        return cast(Any, model.apply({"params": params}, target, source, mutable=["attention"]))[1]["attention"]

    sown, config = jax.device_get(jax.jit(forward)(params, target, source)), model.config
    return {
        kind: _by_layer(sown[stack], sublayer, config.of_stack(stack))
        for kind, (_, stack, sublayer) in KINDS.items()
        if stack in sown and (kind != "cross" or source is not None)
    }


def _by_layer(stack: Any, sublayer: str, config: ModelConfig) -> np.ndarray:
    """What a stack's blocks have sown, one layer after the other, whether they are scanned over or not."""
    period = config.blocks_in_a_round()
    blocks = stack[SCANNED] if config.scan_layers else stack
    found = [np.asarray(blocks[f"block_{number}"][sublayer]["weights_BHTS"][0]) for number in range(period)]
    rounds = np.stack(found, 1 if config.scan_layers else 0)
    return rounds.reshape(config.num_layers, *found[0].shape[-4:])


def look(run: Run, prompt: str, target: str | None = None) -> list[Maps]:
    """Where a run's heads look as it answers or continues a prompt greedily, or says the target.

    The last token is only predicted and asks for nothing, so an end token is left out.

    Raises:
        InputError: prompt or target are too long for the model.
    """
    config, tokenizer, most = run.config.model, run.tokenizer, run.config.model.max_length
    source, seen = prompts_of([prompt], run.config, tokenizer)[0]
    read, more = (seen, ", and a new one,") if source is None else (source, "")
    if len(read) + bool(more) > most:
        raise InputError(f"--prompt: {len(read)} tokens{more} are longer than the model's max_length={most}.")
    if target is None:
        options = decoding_options(run.config, tokenizer)
        options["max_new_tokens"] = min(options["max_new_tokens"], most - len(seen))
        sources = None if source is None else source[None]
        answer = generate(run.model, run.params, seen[None], source=sources, **options)
        said = np.asarray(answer.ids)[0, : int(answer.lengths[0])]
        said = said[: len(said) - (said[-1] in options["eos_id"])]
    else:
        objective = TEXT_OBJECTIVES.get(run.config.data.objective)
        hides = objective is not None and objective.denoisers is not None
        said = tokenizer.encode_with_sentinels(target) if hides else tokenizer.encode([target])[0]
        if len(seen) + len(said) > most:
            raise InputError(
                f"--target: {len(said)} tokens, after {len(seen)} others, are longer than the model's "
                f"max_length={most}."
            )
    ids = np.concatenate([seen, said])
    tokens = Tokens.from_ids(ids[None])
    if config.prefix_attention == "bidirectional":
        tokens = tokens.replace(prefix=tokens.positions < len(seen))
    weights = attention_of(run.model, run.params, tokens, None if source is None else Tokens.from_ids(source[None]))
    ours, theirs = labels(tokenizer, ids), [] if source is None else labels(tokenizer.source, source)
    sides = {"encoder": (theirs, theirs), "self": (ours, ours), "cross": (ours, theirs)}
    return [Maps(kind, each[:, 0], *sides[kind]) for kind, each in weights.items()]


def summary(every: Sequence[Maps]) -> str:
    """How many maps there are, and of how many tokens."""
    sizes = ((maps.kind, *maps.weights_NHTS.shape) for maps in every)
    return "; ".join(f"{kind} attention of {N} x {H} heads, {T} x {S} tokens" for kind, N, H, T, S in sizes)


def labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text, in printable letters; of a token that adds nothing, as special ones, its name.

    Where several tokens make one letter, the last of them has it and those before end in `…`.
    """
    found, before, parts, shown = [], [], [], ""
    for token, name in zip(ids, tokenizer.tokens(ids), strict=True):
        parts.append(token)
        text = tokenizer.decode(before + parts)[len(tokenizer.decode(before)) :]
        whole = text.rstrip("\ufffd")  # without the bytes of a letter that is still coming
        adds = tokenizer.decode([token, token])  # twice, as some leave out a space in front
        label = (whole[len(shown) :] + "…" * (whole != text) if adds else "") or name
        found.append("".join(x if x.isprintable() else repr(x)[1:-1] for x in label.replace(" ", "␣")))
        before, parts, shown = (before, parts, whole) if label.endswith("…") else (parts, [], "")
    return found


# --- as a picture: what follows is in inches, from its upper left corner

MOST_TOKENS, MOST_LAYERS, MOST_HEADS = 64, 12, 16  # that are drawn: more cannot be read
MOST_LETTERS = 12  # of a label
MOST_PIXELS, DPI = 100e6, (80, 160)
CELL, MAP, LEAST = (0.095, 0.22), 1.8, 0.55  # a token's least and most; a map of few tokens, and its least
MARGIN, GAP, TYPE = 0.2, 0.1, 0.11  # between maps, and the height of type
LETTER = 0.62  # a letter's width by its height
LEGEND = "Each row is a token that asks (query), each column one that it takes from (key). Grey is out of its sight."


@dataclasses.dataclass(frozen=True)
class Page:
    """Where maps are drawn: `axes` over all of a figure, the families of its type, the side of a token's cell."""

    axes: Any
    families: list[str]
    left: float
    cell: float

    def write(self, x: float, y: float, text: str, size: float = TYPE, **style: Any) -> None:
        style = {"fontfamily": self.families, "parse_math": False, "va": "center_baseline"} | style
        self.axes.text(x, y, text, fontsize=72 * size, **style)

    def image(self, x: float, y: float, weights_TS: np.ndarray) -> Any:
        """One map; a weight of exactly 0 is a key that its query does not see."""
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        tall, wide = (self.cell * size for size in weights_TS.shape)
        self.axes.add_patch(Rectangle((x, y), wide, tall, fill=False, edgecolor="0.4", linewidth=0.5))
        return self.axes.imshow(
            np.ma.masked_equal(weights_TS, 0),
            cmap=colormaps["magma_r"].with_extremes(bad="0.88"),
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(x, x + wide, y + tall, y),
        )

    def block(self, y: float, maps: Maps, title: str) -> tuple[Any, float, float]:
        """All maps of a kind below y: one of the images, and how far to the right and down they reach."""
        (N, H, T, S), cell, left = maps.weights_NHTS.shape, self.cell, self.left
        tall, wide = (max(cell * size, LEAST) + GAP for size in (T, S))
        small, image = type_in(cell), None
        self.write(MARGIN, y, title, fontweight="bold", fontfamily=self.families[:1])
        y += 2 * TYPE
        for head in range(H):
            self.write(left + head * wide + cell * S / 2, y, f"head {head}", ha="center")
        y += TYPE
        for layer in range(N):
            top = y + layer * tall
            self.write(MARGIN + TYPE / 2, top + cell * T / 2, f"layer {layer}", rotation=90, ha="center", va="center")
            for row, label in enumerate(maps.queries):
                self.write(left - small / 2, top + cell * (row + 0.5), label, small, ha="right")
            for head in range(H):
                image = self.image(left + head * wide, top, maps.weights_NHTS[layer, head])
        y += (N - 1) * tall + cell * T
        for head in range(H):
            for column, label in enumerate(maps.keys):
                x = left + head * wide + cell * (column + 0.5)
                turned = 90 if width(label, small) > 0.8 * cell else 0
                self.write(x, y + small / 2, label, small, rotation=turned, ha="center", va="top")
        return image, left + H * wide, y + small + max(width(label, small) for label in maps.keys)


def type_in(cell: float) -> float:
    """The height of the type of labels."""
    return min(0.8 * cell, TYPE)


def width(label: str, size: float) -> float:
    """About how wide a text is in type of that height."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else LETTER for letter in label)


def fonts_for(letters: set[str]) -> tuple[list[str], dict[int, str]]:
    """Installed families that have glyphs for the letters, and how to spell those that none has one for."""
    from matplotlib.font_manager import fontManager, get_font

    plain = {font.name: font.fname for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)}
    families, missing = ["DejaVu Sans"], set(map(ord, letters))
    for family in sorted(plain, key=lambda name: (name not in families, name)):
        if missing and not family.startswith("Last Resort"):  # which has a box for every letter
            have = missing & get_font(plain[family]).get_charmap().keys()
            missing -= have
            if have and family not in families:
                families.append(family)
    return families, {letter: chr(letter).encode("unicode_escape").decode() for letter in missing}


def shown(maps: Maps, spelling: dict[int, str]) -> tuple[Maps, str]:
    """As much of them as can be read, and a title that says so."""
    limits = {"layers": MOST_LAYERS, "heads": MOST_HEADS, "rows": MOST_TOKENS, "columns": MOST_TOKENS}
    sizes = zip(limits.items(), maps.weights_NHTS.shape, strict=True)
    cut = [f"{most} of {size} {name}" for (name, most), size in sizes if size > most]

    def short(label: str) -> str:
        label = label.translate(spelling)
        return label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + "…"

    weights_NHTS = maps.weights_NHTS[tuple(map(slice, limits.values()))]
    queries, keys = ([short(label) for label in side[:MOST_TOKENS]] for side in (maps.queries, maps.keys))
    title = KINDS[maps.kind][0] + (f": the first {', '.join(cut)}" if cut else "")
    return Maps(maps.kind, weights_NHTS, queries, keys), title


def draw(every: Sequence[Maps], heading: str) -> Any:
    """A matplotlib Figure of the maps: a block for each kind, its layers in rows and its heads in columns."""
    from matplotlib.figure import Figure

    families, spelling = fonts_for(set(heading).union(*(label for maps in every for label in maps.queries + maps.keys)))
    blocks = [shown(maps, spelling) for maps in every]
    asking = [label for maps, _ in blocks for label in maps.queries]
    cell = min(max(MAP / max(max(maps.weights_NHTS.shape[2:]) for maps, _ in blocks), CELL[0]), CELL[1])
    left = MARGIN + 2 * TYPE + max(width(label, type_in(cell)) for label in asking)

    figure = Figure()
    page = Page(figure.add_axes((0, 0, 1, 1)), families, left, cell)
    page.write(MARGIN, MARGIN + TYPE, heading.translate(spelling), 1.4 * TYPE)
    page.write(MARGIN, MARGIN + 3.2 * TYPE, LEGEND)
    y, right, image = MARGIN + 6 * TYPE, 0.0, None
    for maps, title in blocks:
        image, reach, y = page.block(y, maps, title)
        right, y = max(right, reach, width(title, TYPE)), y + 3 * TYPE
    assert image is not None
    x, top, long = right + MARGIN, MARGIN + 9 * TYPE, 1.5  # of the colour bar, beside the first maps
    wide, tall = max(x + 0.7, width(LEGEND, TYPE)), max(y, top + long + MARGIN)

    figure.set_size_inches(wide, tall)
    figure.set_dpi(min(max((MOST_PIXELS / wide / tall) ** 0.5, DPI[0]), DPI[1]))
    page.axes.set(xlim=(0, wide), ylim=(tall, 0), aspect="auto")
    page.axes.axis("off")
    bar = figure.colorbar(image, cax=figure.add_axes((x / wide, 1 - (top + long) / tall, TYPE / wide, long / tall)))
    bar.ax.tick_params(labelsize=72 * TYPE)
    return figure


def write_picture(path: Path, flag: str, figure: Any) -> None:
    """Writes a figure in the format that the path's ending names.

    Raises:
        StorageError: the disk is full, or refuses it.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=figure.dpi)
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        raise StorageError(f"{flag} {path}: cannot be written ({error.strerror}).") from None
