"""Conversations -> tokens, and which of them are learned: those of the turns of chosen roles.

A template in Jinja, as published tokenizers have one (`chat_template`), says what stands around the turns. It is given
marks in place of what was said, so its own tokens are told from text that spells them: nobody can say `<|im_end|>`.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.config_checks import shown
from transformer_jax.data.examples import FixedExamples
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import InputError

# Each turn between marks, as many models have it (ChatML).
DEFAULT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")
MARK = "\ue000{}\ue001"  # letters for private use around a turn's number
FIND = re.compile("\ue000(\\d+)\ue001")


class Turn(NamedTuple):
    """What somebody said."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Chats:
    """Conversations; `places` says where each came from, for messages."""

    turns: list[tuple[Turn, ...]]
    places: list[str]
    kind = "chat"

    def __len__(self) -> int:
        return len(self.turns)

    def all_texts(self) -> Iterator[str]:
        """Every text there is, for training a tokenizer: who speaks, and what is said."""
        return (f"{turn.role}\n{turn.content}\n" for turns in self.turns for turn in turns)

    def place(self, index: int) -> str:
        """Where a conversation came from, for messages."""
        return self.places[index]

    def split(self, fraction: float) -> tuple["Chats", "Chats"]:
        """The last `fraction` of the conversations held out."""
        cut = min(int(len(self) * (1 - fraction)), len(self) - 1)
        return Chats(self.turns[:cut], self.places[:cut]), Chats(self.turns[cut:], self.places[cut:])


def read_turns(place: str, found: Any) -> tuple[Turn, ...]:
    """The `messages` of a record: a list of objects with `role` and `content`. Raises InputError."""
    if not isinstance(found, list) or not found:
        raise InputError(f"{place}: messages must be a list of one or more turns; got {shown(found)}.")
    for number, each in enumerate(found, 1):
        if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("role", "content")):
            raise InputError(f"{place}: turn {number} must have `role` and `content`, both strings; got {shown(each)}.")
        try:
            f"{each['role']}{each['content']}".encode()
        except UnicodeEncodeError:
            raise InputError(f"{place}: turn {number} holds a lone surrogate, which UTF-8 cannot hold.") from None
    return tuple(Turn(each["role"], each["content"]) for each in found)


class Template:
    """What stands around the turns of a conversation.

    Raises:
        InputError: it is no Jinja, or needs what is not known here.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("Conversations need pip install 'transformer_jax[data]', for their template.") from None
        self.tokenizer = tokenizer
        names = tokenizer.tokens([tokenizer.bos_id, tokenizer.eos_id])
        self._known = dict(zip(("bos_token", "eos_token"), names, strict=True))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise InputError(f"data.chat_template: not a template that can be used ({error}).") from None

    @staticmethod
    def _refuse(message: str) -> None:
        raise InputError(f"data.chat_template: {message}")

    def _text(self, roles: Sequence[str], asks: bool = False) -> str:
        """A conversation of these roles, with marks where what they said goes; it `asks` for an answer at its end."""
        messages = [{"role": role, "content": MARK.format(number)} for number, role in enumerate(roles)]
        try:
            return self._template.render(messages=messages, add_generation_prompt=asks, **self._known)
        except InputError:
            raise
        except Exception as error:  # whatever a template does
            raise InputError(f"data.chat_template: {type(error).__name__}: {error}.") from None

    def _learned(self, roles: Sequence[str], learned: Sequence[str]) -> list[tuple[int, int]]:
        """Where what is learned begins and ends in the conversation with marks: from where an answer is asked for to
        the end of the turn, without the space behind it."""
        whole, found = self._text(roles), []
        for number, role in enumerate(roles):
            if role in learned:
                before, after = self._text(roles[:number], asks=True), self._text(roles[: number + 1])
                if not whole.startswith(after) or MARK.format(number) not in after:
                    raise InputError(f"data.chat_template: a turn of {role!r} is told otherwise where more follows it.")
                asked = after.startswith(before) and role == "assistant"
                start = len(before) if asked else after.index(MARK.format(number))
                found.append((start, len(after.rstrip())))
        return found

    def encode(self, turns: Sequence[Turn], learned: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each is learned) of a conversation."""
        roles = [turn.role for turn in turns]
        return self._encoded(self._text(roles), turns, self._learned(roles, learned))

    def prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """The ids of a conversation that asks for an answer."""
        return self._encoded(self._text([turn.role for turn in turns], asks=True), turns, [])[0]

    def end_of(self, role: str) -> int | None:
        """The id of the token behind a turn of a role, None where the end of the text is all there is."""
        text = self._text(["user", role])
        behind = text[text.rindex("\ue001") + 1 :].strip()
        ids = self.tokenizer.encode_marked([behind])[0] if behind else []
        return int(ids[0]) if len(ids) else None

    def _encoded(
        self, text: str, turns: Sequence[Turn], learned: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        cuts = {0, len(text), *(place for pair in learned for place in pair)}
        cuts |= {place for match in FIND.finditer(text) for place in match.span()}
        ends = sorted(cuts)
        ids, flags = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for first, last in itertools.pairwise(ends):
            part = text[first:last]
            said = FIND.fullmatch(part)
            one = self.tokenizer.encode([turns[int(said[1])].content]) if said else self.tokenizer.encode_marked([part])
            inside = any(begin <= first and last <= end for begin, end in learned)
            ids.append(one[0])
            flags.append(np.full(len(one[0]), inside, np.int32))
        return np.concatenate(ids), np.concatenate(flags)


class ChatExamples(FixedExamples):
    """Conversations whole, as targets: their sources are not read, they say which tokens of a target are learned."""

    @property
    def source_lengths(self) -> np.ndarray:
        return np.zeros(len(self.targets), np.int64)
