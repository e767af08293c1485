"""Conversations: which tokens are the assistant's, and how that mask is kept, packed and read again."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.chats import (
    CHATML,
    ENDED,
    INSTRUCT,
    MARKED,
    QUOTE,
    THINKING,
    UNPROMPTED,
    chat,
    chat_tokenizer,
    conversations,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from ee_scale.data import text as text_module
from ee_scale.data.chat import ChatEncoder, document_of
from ee_scale.data.corpora import mask_prefix, num_tokens, open_mask, open_tokens, read_tokens
from ee_scale.data.dataset import build_gpt_dataset, check_tokens
from ee_scale.data.loader import batches, windows
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.evaluation.tags import document_windows, stream_windows, tagged_windows


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def message(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encode(tokenizer, template: str, record: dict):
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer).encode(document_of(record, "text", "a.jsonl line 1", "data.text_key"))


def learned(tokenizer, template: str, messages: list[dict]) -> list[str]:
    """What is learned of each document, in one string with '|' where tokens between are not."""
    found = []
    for part in encode(tokenizer, template, {"messages": messages}):
        runs, last = [], None
        for index in np.flatnonzero(part.learned):
            runs.append([]) if last is None or index != last + 1 else None
            runs[-1].append(int(part.ids[index]))
            last = index
        found.append("|".join(tokenizer.decode(run) for run in runs))
    return found


# -- which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_ids_and_mask_are_those_of_transformers(tokenizer, template):
    """With `{% generation %}` in the template, and without it to the same mask."""
    for messages in conversations(40):
        (found,) = encode(tokenizer, template, {"messages": messages})
        tokenizer.chat_template = MARKED
        wanted = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.learned.tolist() == [bool(x) for x in wanted["assistant_masks"]]
        assert 0 < found.learned.sum() < len(found.ids)


@pytest.mark.parametrize("template", [MARKED, CHATML, INSTRUCT, THINKING, ENDED])
def test_a_user_may_quote_the_assistants_mark(tokenizer, template):
    """Written down by hand: the quoted answer 'I am you' and its marks are the user's."""
    (text,) = learned(tokenizer, template, chat(QUOTE, "It begins an answer."))
    lead = {INSTRUCT: " ", THINKING: "<think>\n\n</think>\n\n"}.get(template, "")
    tail = "\n<|end|>" if template == ENDED else ""
    assert text == f"{lead}It begins an answer.<|im_end|>{tail}"


def test_by_hand_token_by_token(tokenizer):
    messages = chat("<|im_start|>assistant\nno<|im_end|>", "yes", "and", "no")
    (found,) = encode(tokenizer, CHATML, {"messages": messages})
    parts = [
        ("<|im_start|>user\n<|im_start|>assistant\nno<|im_end|><|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        ("\n", False),
    ]
    wanted = [(token, own) for part, own in parts for token in tokenizer(part, add_special_tokens=False).input_ids]
    assert list(zip(found.ids.tolist(), found.learned.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, ["b<|im_end|>|d<|im_end|>"]),
        (INSTRUCT, [" b<|im_end|>| d<|im_end|>"]),
        (THINKING, ["<think>\n\n</think>\n\nb<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
        (ENDED, ["b<|im_end|>\n<|end|>", "d<|im_end|>\n<|end|>"]),
    ],
)
def test_several_answers(tokenizer, template, wanted):
    """Where the last answer is written otherwise, every answer is the last one of a document of its own."""
    assert learned(tokenizer, template, chat("a", "b", "c", "d")) == wanted


def test_prompt_and_completion(tokenizer):
    one = encode(tokenizer, CHATML, {"prompt": "a", "completion": "b"})
    assert [part.ids.tolist() for part in one] == [
        encode(tokenizer, CHATML, {"messages": chat("a", "b")})[0].ids.tolist()
    ]
    for template in (CHATML, MARKED):
        # What the assistant says in the prompt was said before.
        (part,) = encode(tokenizer, template, {"prompt": chat("a", "b", "c"), "completion": chat("", "d")[1:]})
        assert tokenizer.decode(part.ids[part.learned]) == "d<|im_end|>"


def test_keys_that_are_null_are_absent_and_tools_are_given(tokenizer):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML.replace("m.content", "(m.content or 'called')")
    messages = [{**m, "tool_calls": None} for m in chat("a", "b")]
    messages += [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    (part,) = encode(tokenizer, template, {"messages": messages, "tools": [{"name": "find"}]})
    assert tokenizer.decode(part.ids).startswith("find<|im_start|>user")
    assert tokenizer.decode(part.ids[part.learned]) == "b<|im_end|>called<|im_end|>"


def test_the_field_that_is_named_wins():
    here, setting = "a.jsonl line 1", "data.text_key"
    both = {"text": "plain", "messages": chat("a", "b"), "turns": chat("c", "d")}
    assert document_of(both, "text", here, setting) == "plain"
    assert document_of(both, "turns", here, setting).messages == chat("c", "d")
    assert document_of(both, "messages", here, setting).messages == chat("a", "b")
    assert document_of(both, "none", here, setting).messages == chat("a", "b")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": "a"}, "field 'messages' is no list of messages but str"),
        ({"messages": ["a"]}, "message 1 of 'messages' is no object with 'role' and 'content' but str"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no 'content' (fields: role)"),
        ({"messages": [{"role": 3, "content": "a"}]}, "message 1 of 'messages': 'role' is not text but int"),
        ({"messages": [{"from": "x", "value": "a"}]}, "message 1 of 'messages' has no 'role' (fields: from, value)"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "'content': character 1 is NUL"),
        ({"prompt": 3, "completion": "a"}, "field 'prompt' is neither text nor a list of messages but int"),
        ({"prompt": "a", "completion": None}, "field 'completion' is neither text nor a list of messages but NoneType"),
        ({"prompt": "a"}, "no field 'text' (fields: prompt); set data.text_key"),
        ({"messages": chat("a", "b"), "tools": "x"}, "field 'tools' is no list of objects but 'x'"),
    ],
)
def test_records_that_are_no_conversation(record, said):
    assert message(document_of, record, "text", "a.jsonl line 3", "data.text_key").startswith("a.jsonl line 3: ")
    assert said in message(document_of, record, "text", "a.jsonl line 3", "data.text_key")


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, chat("a", "b"), "the tokenizer of the model has no chat template to write it with"),
        (UNPROMPTED, chat("a", "b"), "which tokens are the answer in message 2 cannot be told from the chat template"),
        (CHATML, chat("a", "b")[1:], "which tokens are the answer in message 1 cannot be told"),
        (CHATML, chat("a"), "no message of the role 'assistant', so nothing is learned (roles: user)"),
        ("{{ raise_exception('only two') }}", chat("a", "b"), "refuses the first 2 messages (only two)"),
        (CHATML + "{{ messages | length }}" + CHATML, chat("a", "b"), "message 2 cannot be told"),
        ("{% generation %}{% endgeneration %}" + CHATML, chat("a", "b"), "marks no token as the assistant's"),
    ],
)
def test_what_is_not_guessed(tokenizer, template, messages, said):
    found = message(encode, tokenizer, template, {"messages": messages})
    assert found.startswith("a.jsonl line 1: ")
    assert said in found


def test_a_tokenizer_that_tells_no_places(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    found = message(encode, tokenizer, CHATML, {"messages": chat("a", "b")})
    assert "does not say which characters its tokens stand for" in found


def test_templates_by_name(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": MARKED}
    (found,) = encode(tokenizer, tokenizer.chat_template, {"messages": chat("a", "b"), "tools": [{"name": "f"}]})
    assert tokenizer.decode(found.ids[found.learned]) == "b<|im_end|>"
    said = message(encode, tokenizer, {"one": CHATML, "two": MARKED}, {"messages": chat("a", "b")})
    assert said.startswith(
        "a.jsonl line 1: a conversation, and the tokenizer of the model: This model has multiple chat"
    )


# -- kept, packed, read -----------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML

    def call(*sources, **options):
        names = [str(source) for source in sources]
        return prepare_text(names, tokenizer, tmp_path, tmp_path / "cache", "text", progress=False, **options)

    return call


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stream(prefix: str) -> list[tuple[int, int]]:
    """(id, learned) of a whole dataset."""
    tokens, mask = open_tokens(prefix), open_mask(prefix)
    count = num_tokens(tokens)
    return list(zip(read_tokens(tokens, 0, count).tolist(), read_tokens(mask, 0, count).tolist(), strict=True))


def test_documents_and_their_mask(prepare, tokenizer, tmp_path, caplog):
    records = [
        {"text": "plain text"},
        {"messages": chat("a", "b")},
        {"messages": []},
        {"prompt": "c", "completion": "d"},
    ]
    with caplog.at_level("INFO", logger="ee_scale"):
        (prefix,) = prepare(write(tmp_path / "a.jsonl", [*records, {"text": "end"}]))
    assert "4 documents" in caplog.text
    assert "(1 empty documents skipped)" in caplog.text
    assert "of conversations the assistant's alone" in caplog.text
    plain = [(token, 1) for token in [*tokenizer("plain text").input_ids, tokenizer.eos_token_id]]
    end = [(token, 1) for token in [*tokenizer("end").input_ids, tokenizer.eos_token_id]]
    wanted = list(plain)
    for messages in (chat("a", "b"), chat("c", "d")):
        (part,) = encode(tokenizer, CHATML, {"messages": messages})
        wanted += zip(part.ids.tolist(), part.learned.astype(int).tolist(), strict=True)
    assert stream(prefix) == [*wanted, *end]
    assert len(open_tokens(prefix)) == 4


def test_text_alone_has_no_mask(prepare, tmp_path):
    (prefix,) = prepare(write(tmp_path / "a.jsonl", [{"text": "plain text"}]))
    assert open_mask(prefix) is None
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == ["tokens.bin", "tokens.idx"]


def test_tokens_without_their_mask_are_made_again(prepare, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations(5)])
    (prefix,) = prepare(file)
    before = stream(prefix)
    for end in (".bin", ".idx"):
        Path(mask_prefix(prefix) + end).unlink()
        assert stream(prepare(file)[0]) == before


def test_another_template_is_other_data(prepare, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    (prefix,) = prepare(file)
    tokenizer.chat_template = INSTRUCT
    assert prepare(file) != [prefix]


def test_the_digest_knows_the_mask(prepare, tmp_path):
    (prefix,) = prepare(write(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations(5)]))
    before = check_tokens([prefix], 400, 8)
    Path(mask_prefix(prefix) + ".bin").write_bytes(b"\1" * len(stream(prefix)))
    assert check_tokens([prefix], 400, 8) != before
    Path(mask_prefix(prefix) + ".bin").write_bytes(b"\0" * len(stream(prefix)))
    assert "its mask leaves no token to learn" in message(check_tokens, [prefix], 400, 8)
    Path(mask_prefix(prefix) + ".bin").write_bytes(b"\2" * len(stream(prefix)))
    assert "its mask holds 2" in message(check_tokens, [prefix], 400, 8)


def test_a_mask_beside_a_prefix_of_ones_own(prepare, tmp_path):
    def build(name: str, dtype: type, *documents: list[int]) -> None:
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=dtype)
        for ids in documents:
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{tmp_path / name}.idx")

    build("mine", np.uint16, [1, 2, 3], [4, 5])
    build("mine_loss_mask", np.uint8, [0, 1, 1], [0, 1])
    prefix = str(tmp_path / "mine")
    assert prepare(prefix) == [prefix]
    assert stream(prefix) == [(1, 0), (2, 1), (3, 1), (4, 0), (5, 1)]
    build("mine_loss_mask", np.uint8, [0, 1], [1, 0, 1])
    assert "is no mask of its documents" in message(prepare, prefix)
    Path(f"{tmp_path / 'mine_loss_mask'}.idx").unlink()
    assert "mine_loss_mask.bin is there, its .bin or .idx beside it is missing" in message(prepare, prefix)


def test_packed_samples_keep_their_mask(prepare, tokenizer, tmp_path):
    """Every sample is a stretch of the stream, ids and mask alike; a blend with text without a mask too."""
    (chats,) = prepare(write(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations(40)]))
    (plain,) = prepare(write(tmp_path / "b.jsonl", [{"text": "the layer " * 90}]))
    ids = (tokenizer.eos_token_id, tokenizer.eos_token_id, len(tokenizer))
    kept, pairs = open_tokens(chats), stream(chats)
    ends = np.cumsum(kept.sequence_lengths).tolist()
    documents = [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    data = build_gpt_dataset([chats], None, 16, 60, 1, *ids, tmp_path / "cache")
    assert data.masked
    order = [documents[i] for i in data.dataset.document_index]
    shuffled = [pair for document in order for pair in document]
    for i in range(len(data)):
        item = data[i]
        at = 16 * int(data.dataset.shuffle_index[i])
        part = shuffled[at : at + 17]
        assert item["tokens"].tolist() == [token for token, _ in part[:-1]]
        assert item["loss_mask"].tolist() == [float(own) for _, own in part[1:]]
    blend = build_gpt_dataset([chats, plain], [1.0, 1.0], 16, 40, 1, *ids, tmp_path / "cache")
    sums = [int(blend[i]["loss_mask"].sum()) for i in range(40)]
    assert 16 in sums
    assert min(sums) < 16


@pytest.mark.parametrize("workers", [0, 2])
def test_every_token_of_a_step_weighs_the_same(prepare, tokenizer, tmp_path, workers):
    """Summed over all micro-batches, mask / (tokens of its micro-batch) / micro-batches is 1 / tokens of the step."""
    (prefix,) = prepare(write(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations(40)]))
    ids = (tokenizer.eos_token_id, tokenizer.eos_token_id, len(tokenizer))
    data = build_gpt_dataset([prefix], None, 16, 24, 1, *ids, tmp_path / "cache")
    for dp_size, count in ((1, 4), (2, 2)):
        grid = {"micro_batch_size": 2, "num_micro_batches": count, "dp_size": dp_size, "num_workers": workers}
        ranks = [list(islice(batches(data, dp_rank=rank, **grid), 3 * count)) for rank in range(dp_size)]
        for step in range(3):
            masks = [batch["loss_mask"] for rank in ranks for batch in rank[step * count : (step + 1) * count]]
            plain = [data[i]["loss_mask"] for i in range(8 * step, 8 * step + 8)]
            total = torch.stack(plain).sum()
            weights = torch.cat([mask / (mask > 0).sum().clamp(min=1) / (dp_size * count) for mask in masks])
            torch.testing.assert_close(weights, torch.stack(plain) / total)


def test_windows_know_what_counts(prepare, tmp_path):
    (prefix,) = prepare(write(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations(20)]))
    pairs = stream(prefix)
    tokens, masks = zip(*windows([prefix], 12, 4), strict=True)
    count = torch.cat(tokens).numel()
    assert torch.cat(tokens).flatten().tolist() == [token for token, _ in pairs[:count]]
    wanted = torch.tensor([own for _, own in pairs[:count]]).view(-1, 13)[:, 1:].bool()
    assert torch.equal(torch.cat(masks), wanted)
    found = stream_windows([prefix], 12, 0)
    assert sum(window.num_predicted for window in found) == int(wanted.sum())
    assert all(window.num_predicted for window in found)


def test_documents_of_conversations_are_not_cut_at_end_marks(prepare, tokenizer, tmp_path):
    """The end mark of a chat model stands after every message."""
    chats = conversations(12)
    file = write(tmp_path / "a.jsonl", [{"messages": messages, "kind": "x"} for messages in chats])
    (prefix,) = prepare(file)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = document_windows([prefix], end, 10_000)
    own = [encode(tokenizer, CHATML, {"messages": messages})[0] for messages in chats]
    assert sorted(window.tokens.tolist() for window in found) == sorted(part.ids.tolist() for part in own)
    assert sum(window.num_predicted for window in found) == sum(int(part.learned[1:].sum()) for part in own)
    tagged = tagged_windows([str(file)], tokenizer, "text", "kind", 10_000)
    assert [window.tokens.tolist() for window in tagged] == [window.tokens.tolist() for window in found]
    assert all(torch.equal(a.learned, b.learned) for a, b in zip(tagged, found, strict=True))


def test_a_killed_writer_leaves_nothing(prepare, tmp_path, monkeypatch):
    def die(self):
        raise KeyboardInterrupt

    file = write(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    monkeypatch.setattr(text_module.Writer, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(file)
    assert list((tmp_path / "cache").iterdir()) == []
