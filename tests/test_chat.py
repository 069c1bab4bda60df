"""Conversations: what is learned of them, and that nobody can say a special token."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax import load_run
from transformer_jax.cli import run_command
from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.data.chat import DEFAULT, MARKS, Chats, Template, Turn
from transformer_jax.data.load import make_rows
from transformer_jax.data.sources import read
from transformer_jax.data.tokenizer import make_tokenizer, tokenizer_of
from transformer_jax.errors import InputError
from transformer_jax.evaluate import decoding_options
from transformer_jax.huggingface.run import as_published

pytest.importorskip("jinja2", reason="templates are Jinja")

law = settings(derandomize=True, deadline=None, max_examples=60)
ROLES = ("system", "user", "assistant")
TOKENIZER = make_tokenizer("bpe", 300, lambda: ["user assistant system hello there"], MARKS)
TEMPLATE = Template(DEFAULT, TOKENIZER)
START, END = (TOKENIZER.id_of(name) for name in MARKS)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
said = st.text(st.sampled_from("ab \n<|im_end>é日"), max_size=8)
turns = st.lists(st.builds(Turn, st.sampled_from(ROLES), said), min_size=1, max_size=5)


@law
@given(turns)
def test_what_is_said_is_told_from_what_stands_around_it(turns):
    """Each turn is between its marks, whatever is said; the answers and their ends are learned, and nothing else."""
    ids, flags = TEMPLATE.encode(turns, ("assistant",))
    assert ids.tolist().count(START) == ids.tolist().count(END) == len(turns)
    begins, ends = np.flatnonzero(ids == START), np.flatnonzero(ids == END)
    for turn, begin, end in zip(turns, begins, ends, strict=True):
        header = len(TOKENIZER.encode([f"{turn.role}\n"])[0])
        content = ids[begin + 1 + header : end]
        assert TOKENIZER.decode(content) == turn.content
        learned = turn.role == "assistant"
        assert flags[begin : begin + 1 + header].max() == 0
        assert (flags[begin + 1 + header : end + 1] == learned).all()
    assert flags.sum() == sum(
        len(TOKENIZER.encode([turn.content])[0]) + 1 for turn in turns if turn.role == "assistant"
    )


@law
@given(turns)
def test_a_prompt_is_what_stands_before_an_answer(turns):
    """What is asked is the conversation up to where the answer is learned."""
    ids, flags = TEMPLATE.encode([*turns, Turn("assistant", "ab")], ("assistant",))
    prompt = TEMPLATE.prompt(turns)
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert flags[len(prompt)] == 1
    assert TEMPLATE.end_of("assistant") == END


def test_templates_of_others():
    """With the tokenizer's own start and end, and with any roles learned."""
    template = Template(LLAMA, TOKENIZER)
    ids, flags = template.encode([Turn("user", " a "), Turn("assistant", "b"), Turn("user", "c")], ("user",))
    names = [TOKENIZER.decode([token]) or TOKENIZER.tokens([token])[0] for token in ids]
    assert "".join(names) == "<bos>[user] a [assistant]b<eos>[user]c"
    assert "".join(name for name, flag in zip(names, flags, strict=True) if flag) == " a c"
    assert template.end_of("assistant") == TOKENIZER.eos_id


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "not a template that can be used"),
        ("{{ raise_exception('only two roles') }}", "data.chat_template: only two roles"),
        ("{{ messages[9].content.no }}", "data.chat_template: "),
        ("{{ messages | length }}{{ messages[0].content }}", "is told otherwise where more follows it"),
        ("{{ ''.__class__.__mro__ }}", "data.chat_template: "),
        ("{{ messages.append(1) }}", "data.chat_template: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "data.chat_template: OverflowError"),
        ("{{ 1 / 0 }}", "data.chat_template: ZeroDivisionError"),
    ],
)
def test_a_template_that_cannot_be_used(template, says):
    with pytest.raises(InputError, match=re.escape(says)):
        Template(template, TOKENIZER).encode([Turn("user", "a"), Turn("assistant", "b")], ("assistant",))


def chats(*conversations):
    return Chats([tuple(turns) for turns in conversations], [f"place {n}" for n in range(len(conversations))])


TWO = [Turn("user", "hello"), Turn("assistant", "there"), Turn("user", "a"), Turn("assistant", "bé")]


@pytest.mark.parametrize("mode", ["decoder-only", "encoder-decoder"])
def test_rows_learn_the_answers(mode):
    """Without an encoder every answer, with one the last of each conversation; others are counted and left out."""
    model = ModelConfig(mode=mode, vocab_size=400, d_model=8, num_heads=2, max_length=128)
    run = RunConfig(model=model, data=DataConfig(objective="chat", too_long="drop"))
    long = [Turn("user", "x" * 500), Turn("assistant", "b")]
    corpus = chats(TWO, [Turn("user", "nobody answers")], long, TWO[:2])
    rows, kept, report = make_rows("train", corpus, run, TOKENIZER)
    assert len(kept) == 2
    assert "1 chats have no turn of assistant: left out" in report[0]
    assert "1 of 3 chats are longer than a row; the first is place 2" in report[1]
    batch = rows.batch(np.arange(len(rows)), 0)
    learned = batch.labels[batch.weights > 0].tolist()
    answers = [[*ids.tolist(), END] for ids in TOKENIZER.encode(["there", "bé", "there"])]
    if mode == "encoder-decoder":
        answers = [[*ids.tolist(), TOKENIZER.eos_id] for ids in TOKENIZER.encode(["bé", "there"])]
    assert sorted(learned) == sorted(token for ids in answers for token in ids)


def test_a_conversation_that_is_none_is_refused(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for bad, says in (
        ({"messages": []}, "line 2: messages must be a list of one or more turns"),
        ({"messages": [{"role": "user"}]}, "line 2: turn 1 must have `role` and `content`"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "line 2: turn 1 must have"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 2: turn 1 holds a lone surrogate"),
        ({"text": "a"}, "line 2: has other fields than the lines before"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(InputError, match=re.escape(says)):
            read((str(tmp_path / "a.jsonl"),))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["decoder-only", "encoder-decoder"])
def test_a_run_answers_in_turn(mode, tmp_path):
    """From conversations in a file and a template in another; the end of a turn ends an answer."""
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for _ in range(40)))
    (tmp_path / "t.jinja").write_text(LLAMA)
    words = f"train text --model.mode {mode} --data.train {tmp_path / 'c.jsonl'} --data.tokenizer char --steps 60"
    words += f" --workdir {tmp_path / 'run'} --data.chat-template {tmp_path / 't.jinja'} --model.max-length 64"
    words += (
        " --model.d-model 32 --model.num-layers 1 --model.num-heads 2 --model.d-ff 64 --batch-size 2 --eval-every 60"
    )
    words += " --optimizer.learning-rate 0.01"
    assert run_command(words.split()) == 0
    run = load_run(tmp_path / "run")
    assert run.config.data.objective == "chat"
    assert run.config.data.chat_template == LLAMA
    assert run.tokenizer.eos_id in decoding_options(run.config, run.tokenizer)["eos_id"]
    assert "one\n  output   two" in (tmp_path / "run" / "samples.txt").read_text()
    assert run_command(["describe", str(tmp_path / "run"), "--examples", "1"]) == 0
    files = as_published(run)  # for others the template stands around a text, and not the tokenizer
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == LLAMA
    ends = [run.tokenizer.eos_id] if mode == "encoder-decoder" else []
    published = tokenizer_of(files["tokenizer.json"]).encode_as_published(["[assistant]"])[0]
    assert published.tolist() == [*run.tokenizer.encode(["[assistant]"])[0], *ends]
    assert run_command(words.split()) == 0  # finished already: the template is the same
