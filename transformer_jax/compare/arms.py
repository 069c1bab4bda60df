"""A recipe -> the arms of a comparison, all with the same number of parameters and the same budget of training.

In closed form, without embeddings: a layer of an encoder, or of a decoder alone, has 4 d^2 + 2 d ff parameters, and one
of a decoder with cross-attention 8 d^2 + 2 d ff. So with ff = 4 d a decoder-only model of L layers has as many as an
encoder-decoder of Le and Ld layers where L = Le + 4/3 Ld.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from transformer_jax.compare import STUDIES, Changes
from transformer_jax.compare.measure import Speed, Watch, take_turns
from transformer_jax.config import ModelConfig, RunConfig
from transformer_jax.data.batches import PackedRows
from transformer_jax.data.load import load_data
from transformer_jax.data.objectives import ARRANGEMENTS, room_of
from transformer_jax.describe import measure_model
from transformer_jax.errors import InputError
from transformer_jax.run import abstract_params

BACKWARD = 3  # FLOPs of a training step, in those of its forward pass


class Arm(NamedTuple):
    """One way to build and train the model.

    Attributes:
        run: its settings, but for the seed and the folder.
        parameters: of the model.
        examples: that a step reads on average.
        flops: of a step, of full rows.
        kept: how many pairs or conversations of the training and of the validation data fit its rows; None of text,
            all of which does.
        watch: measures what it takes here.
    """

    run: RunConfig
    parameters: int
    examples: float
    flops: float
    kept: tuple[int, int] | None
    watch: Watch

    @property
    def speed(self) -> Speed:
        """What it takes here, once it was measured."""
        assert self.watch.speed is not None
        return self.watch.speed


# What a step costs of what is matched.
COSTS: dict[str, Callable[[Arm], float]] = {
    "parameters": lambda arm: arm.examples,
    "flops": lambda arm: arm.flops,
    "time": lambda arm: arm.speed.seconds,
}


@functools.cache
def count(model: ModelConfig) -> int:
    """Parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))


def layers_of(model: ModelConfig, mode: str, layers: int) -> dict[str, Any]:
    """So many layers, of which an encoder has the share that it has in `model`, or half."""
    if not ARRANGEMENTS[mode].has_source:
        return {"num_layers": layers, "num_encoder_layers": None}
    has = ARRANGEMENTS[model.mode].has_source
    share = model.num_encoder_layers / (model.num_encoder_layers + model.num_layers) if has else 0.5
    encoder = min(max(1, round(layers * share)), layers - 1)
    return {"num_layers": layers - encoder, "num_encoder_layers": encoder}


def matched(model: ModelConfig, changes: Changes, budget: int) -> ModelConfig:
    """The model with the changes that has as many parameters as `budget`: first by its layers, then by d_ff.

    Raises:
        InputError: there is none within a hundredth.
    """
    changes = {name: value(model) if callable(value) else value for name, value in changes.items()}
    mode, found = changes.get("mode", model.mode), model
    if mode != model.mode:

        def of(layers: int) -> ModelConfig:
            return model.replace(mode=mode, **layers_of(model, mode, layers), d_ff=model.d_ff)

        layers = 2 if ARRANGEMENTS[mode].has_source else 1
        while count(of(layers + 1)) <= budget:
            layers += 1
        found = of(min((layers, layers + 1), key=lambda number: abs(count(of(number)) - budget)))
    found = found.replace(**changes, d_ff=model.d_ff)
    if lacking := budget - count(found):
        slope = count(found.replace(d_ff=model.d_ff + 1)) - count(found)
        found = found.replace(d_ff=max(1, model.d_ff + round(lacking / slope)))
    if abs(count(found) - budget) > 0.01 * budget:
        raise InputError(
            f"no {mode} model of d_model={model.d_model} has about {budget:,} parameters; the nearest has "
            f"{count(found):,}."
        )
    return found


def arms_of(run: RunConfig, study: str, names: tuple[str, ...], match: str) -> dict[str, Arm]:
    """The arms of a comparison, the recipe's own model the measure of the others.

    Args:
        run: the recipe's settings.
        study: of STUDIES.
        names: of its arms.
        match: what all of them have as much of as the recipe's own: `parameters` is that and the same examples, `flops`
            and `time` are those of training, with as many parameters.

    Raises:
        InputError: the data is none that all arms can learn from, or a model cannot be matched.
    """
    own = _arm(run)
    if own is None:  # running text, of which an encoder reads nothing: all are to predict the same tokens
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, objective="prefix-lm"))
        own = _arm(run)
    if own is None:
        raise InputError("compare: a mixture has no examples that all arms could learn from alike.")
    found = {}
    for name in names:
        try:
            model = matched(own.run.model, STUDIES[study][name], own.parameters)
        except ValueError as error:
            raise InputError(f"compare: {name}: {error}") from error
        arm = own if model == own.run.model else _arm(dataclasses.replace(run, model=model))
        assert arm is not None
        found[name] = arm
    _check_kept(found)
    measure([*found.values(), own] if match == "time" else [])
    cost = COSTS[match]
    budget = run.steps * cost(own)
    for name, arm in found.items():
        steps = max(1, round(budget / cost(arm)))
        warmup = arm.run.optimizer.warmup_steps
        optimizer = dataclasses.replace(
            arm.run.optimizer, warmup_steps=warmup and max(1, round(warmup * steps / run.steps))
        )
        every = max(1, round(run.eval_every * steps / run.steps))
        settings = dataclasses.replace(arm.run, steps=steps, optimizer=optimizer, eval_every=every)
        found[name] = arm._replace(run=settings)
    return found


def _check_kept(arms: dict[str, Arm]) -> None:
    """Raises InputError where arms left out other examples, so that they would not learn from the same ones."""
    if len({arm.kept for arm in arms.values()}) > 1:
        kept = (f"{name} {arm.kept[0]:,} and {arm.kept[1]:,}" for name, arm in arms.items() if arm.kept)
        raise InputError(
            "compare: arms would learn from other examples, as rows of some have no room for those that are longer. Of "
            f"training and validation data there would be left for {', for '.join(kept)}. Raise --model.max-length, or "
            "take the longest out of the data."
        )


def measure(arms: Iterable[Arm]) -> None:
    """Measures what those arms take here that have not been, in turns."""
    watches = {id(arm.watch): arm.watch for arm in arms if arm.watch.speed is None}
    take_turns(list(watches.values()))


def _arm(run: RunConfig) -> Arm | None:
    """None where its data is no examples in rows of their own."""
    data = load_data(run)
    if not isinstance(data.train, PackedRows) or data.config.data.objective == "span-corruption":
        return None
    model = data.config.model
    flops = sum(part.flops for part in measure_model(model, run.batch_size, room_of(model, run.data)))
    examples = len(data.train.members.ids) / len(data.train) * run.batch_size
    settings, kept = dataclasses.replace(run, model=model), None
    if data.config.data.objective in ("sequence-to-sequence", "chat"):
        assert isinstance(data.validation, PackedRows)
        kept = len(data.train.members.ids), len(data.validation.members.ids)
    return Arm(settings, count(model), examples, BACKWARD * flops, kept, Watch(data))
