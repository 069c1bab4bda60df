"""Published results, and what it takes to reach them here."""

import dataclasses
from typing import Literal

from transformer_jax.translation.scores import TOKENIZED_BLEU


@dataclasses.dataclass(frozen=True)
class Published:
    """One figure that others have published.

    Attributes:
        recipe: of RECIPES, which has all settings.
        metric: what is measured: `loss` in nats a token, or a BLEU.
        value: what was published.
        band: how much worse it may be here and still counts as reached.
        source: who published it, and where.
        means: what the figure is, and what is not the same here.
        data: what --data takes.
        takes: time and hardware.
        files: of a folder with pairs, the names of source and target by their part; none for one file of text.
        moses: the languages of source and target where pairs are lower-cased tokens of Moses, with plain punctuation.
        averaged: how many of the last checkpoints are averaged, of those that the recipe saves each so many steps;
            0 takes the best by validation loss.
        beam_size: of the outputs.
        length_penalty: of the outputs.
        early_stopping: of the outputs.
        measured: what the whole of it gave when it was run for this project, with seeds 0, 1 and so on; nothing where
            it was not run.
    """

    recipe: str
    metric: Literal["loss", "bleu", "tokenized_bleu_lowercased"]
    value: float
    band: float
    source: str
    means: str
    data: str
    takes: str
    files: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    moses: tuple[str, ...] = ()
    averaged: int = 0
    beam_size: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    measured: tuple[float, ...] = ()

    @property
    def more_is_better(self) -> bool:
        return self.metric != "loss"

    def reached(self, measured: float) -> bool:
        """Whether a measured figure is as good as the published one, or within the band of it."""
        return measured >= self.value - self.band if self.more_is_better else measured <= self.value + self.band

    @property
    def wanted(self) -> str:
        """The figure that counts as reached, in words."""
        if self.more_is_better:
            return f"at least {self.value - self.band:g}"
        return f"at most {self.value + self.band:g}"


NANOGPT = "karpathy/nanoGPT, README"
SHAKESPEARE = "tinyshakespeare.txt, the file of karpathy/char-rnn"

PUBLISHED: dict[str, Published] = {
    "shakespeare-char-cpu": Published(
        recipe="shakespeare-char",
        metric="loss",
        value=1.88,
        band=0.0,
        source=NANOGPT,
        means="Loss a character. Theirs is an estimate over random parts of the validation split, this is all of it.",
        data=SHAKESPEARE,
        takes="3 minutes on 2 CPU cores",
        measured=(1.836,),
    ),
    "shakespeare-char-gpu": Published(
        recipe="shakespeare-char-gpu",
        metric="loss",
        value=1.4697,
        band=0.01,
        source=NANOGPT,
        means="Loss a character of the best checkpoint. Theirs is an estimate over random parts of the validation "
        "split, this is all of it.",
        data=SHAKESPEARE,
        takes="minutes on a GPU, hours on 2 CPU cores",
    ),
    "multi30k-tiny": Published(
        recipe="multi30k-tiny",
        metric=TOKENIZED_BLEU,
        value=41.02,
        band=0.02,
        source="Wu et al. 2021, Good for Misconceived Reasons, table 2, text only",
        means="BLEU of lower-cased tokens of Moses, punctuation made plain, on test2016, English to German; not "
        "comparable with sacreBLEU's.",
        data="a folder with train, val and test_2016_flickr as .en and .de, plain or .gz: Multi30k, task 1, as it is",
        takes="minutes on a GPU, 2 hours 20 minutes on 2 CPU cores",
        files={
            "train": ("train.en", "train.de"),
            "validation": ("val.en", "val.de"),
            "test": ("test_2016_flickr.en", "test_2016_flickr.de"),
        },
        moses=("en", "de"),
        averaged=10,
        beam_size=5,
        early_stopping=True,  # fairseq's
        measured=(40.91,),
    ),
    "gpt2-124m": Published(
        recipe="gpt2-124m",
        metric="loss",
        value=2.85,
        band=0.02,
        source=NANOGPT,
        means="Loss a token of GPT-2's vocabulary, validation split of OpenWebText.",
        data="OpenWebText as text, or a folder that `transformer-jax prepare` made of it",
        takes="about 4 days on 8 A100 there",
    ),
    "wmt14-base": Published(
        recipe="transformer-base",
        metric="bleu",
        value=27.3,
        band=1.0,
        source="Vaswani et al. 2017, table 2, base",
        means="English to German, newstest2014. Theirs is BLEU of tokens with compounds split, sacreBLEU's of text is "
        "lower, hence the band.",
        data="a folder with train, newstest2013 and newstest2014 as .en and .de, plain or .gz",
        takes="12 hours on 8 P100 there",
        files={
            "train": ("train.en", "train.de"),
            "validation": ("newstest2013.en", "newstest2013.de"),
            "test": ("newstest2014.en", "newstest2014.de"),
        },
        averaged=5,
        beam_size=4,
        length_penalty=0.6,
    ),
}
