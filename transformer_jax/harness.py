"""A run as a model of EleutherAI's lm-evaluation-harness (Gao et al. 2021): `pip install "transformer_jax[harness]"`.

    import lm_eval
    from transformer_jax import load_run
    from transformer_jax.harness import HarnessModel

    lm_eval.simple_evaluate(HarnessModel(load_run("runs/text")), tasks=["lambada_openai"])

A decoder-only model reads the context; an encoder-decoder reads it as the source.
"""

from typing import Any

import jax
import numpy as np

from transformer_jax.data.objectives import ARRANGEMENTS, arrangement_of
from transformer_jax.decoding import Prompt, generate_all
from transformer_jax.errors import InputError
from transformer_jax.run import Run
from transformer_jax.scoring import Question, score

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError('lm-eval is not installed: pip install "transformer_jax[harness]"') from error


class HarnessModel(TemplateLM):
    """The harness's questions, answered by a run."""

    def __init__(self, run: Run, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        data = run.config.data
        if not arrangement_of(data.objective, run.config.model.mode).answers or data.source_tokenizer:
            raise InputError(
                f"The harness asks for what follows a text: not of a run with data.objective={data.objective!r}"
                f"{' and two tokenizers' if data.source_tokenizer else ''}."
            )
        self.run, self.batch_size, self.key = run, batch_size, jax.random.key(seed)
        self.backend = "seq2seq" if self._reads_source else "causal"

    @property
    def _reads_source(self) -> bool:
        return ARRANGEMENTS[self.run.config.model.mode].has_source

    @property
    def _pairs(self) -> bool:
        """The run was trained on pairs, so a context is a source with its own end."""
        return self.run.config.data.objective != "causal"

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.run.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.run.config.model.max_length

    @property
    def tokenizer_name(self) -> str:
        return "transformer_jax"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.run.tokenizer.encode([string])[0].tolist()

    def _prompt(self, context: list[int], room: int) -> Prompt:
        """What encoder and decoder see of a context: its last tokens, so that `room` more can be said."""
        tokenizer, most = self.run.tokenizer, self.max_length
        context = context[1:] if context[:1] == [tokenizer.bos_id] else context
        if self._pairs:
            extra = 1 if self._reads_source else 2 + room
            kept = context[max(0, len(context) - max(most - extra, 0)) :]
            return ARRANGEMENTS[self.run.config.model.mode].prompt(np.array(kept, np.int32), tokenizer)
        kept = context[max(0, len(context) - max(most - 1 - room, 0)) :]
        return None, np.array([tokenizer.bos_id, *kept], np.int32)

    def _scores(self, questions: list[Question]) -> list[tuple[float, bool]]:
        found = score(self.run.model, self.run.params, questions, batch_size=self.batch_size)
        return [(each.log_prob, each.greedy) for each in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one. Contexts lose their beginning
        where both are longer than the model's `max_length`."""

        def question(context: list[int], said: list[int]) -> Question:
            said = said[-self.max_length :]
            return self._prompt(context, len(said) - 1), np.array(said, np.int32)

        return self._scores([question(context, said) for _, context, said in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of `max_length` tokens that do not overlap."""
        parts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            longest = self.max_length - (self._pairs and not self._reads_source)  # there a separator is read as well
            windows = get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)
            parts.append([make_disjoint_window(window) for window in windows])

        def question(context: list[int], said: list[int]) -> Question:
            if self._pairs:
                return self._prompt([], len(said) - 1), np.array(said, np.int32)
            return (None, np.array(context, np.int32)), np.array(said, np.int32)

        found = iter(self._scores([question(*window) for each in parts for window in each]))
        return [sum(next(found)[0] for _ in each) for each in parts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context up to the first of its stop strings, without that."""
        found = [""] * len(requests)
        kinds: dict[tuple[int, float], list[int]] = {}
        for place, request in enumerate(requests):
            options = request.args[1]
            heat = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
            new = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
            kinds.setdefault((min(new, self.max_length // 2), heat), []).append(place)
        for (new, heat), places in kinds.items():
            prompts = [self._prompt(self.tok_encode(requests[place].args[0]), new) for place in places]
            drawing: dict[str, Any] = dict(temperature=heat, key=self.key) if heat > 0 else {}
            tokenizer = self.run.tokenizer
            outputs = generate_all(
                self.run.model,
                self.run.params,
                prompts,
                max_new_tokens=new,
                batch_size=min(self.batch_size, len(prompts)),
                eos_id=[tokenizer.eos_id, *self.run.config.data.special.stops],
                pad_id=tokenizer.pad_id,
                **drawing,
            )
            for output in outputs:
                place = places[output.place]
                stops = requests[place].args[1].get("until", [])
                text = tokenizer.decode(output.ids)
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                found[place] = text
        return found
