"""A prefix that starts as a text, and the dropout on it."""

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import decide, flags, train

from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer, read_prefix_config
from finetune_chatmodel_demo.chatglm3.prefix import encode_start, keys_and_values, start_prefix_as
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training import methods
from finetune_chatmodel_demo.training.command_line import parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings

TEXT = "妙蛙种子的属性是草、毒。"

pytestmark = pytest.mark.usefixtures("no_pictures")


# The convention


@pytest.mark.parametrize("length", [2, 7, 24])
def test_a_prefix_of_text_means_the_text_in_front(length, tiny_folder, tokenizer):
    """The model with the prefix computes for a text what the base computes for it behind the prefix's text."""
    loaded = load_model(tiny_folder, pre_seq_len=length, dtype=torch.float32, device="cpu")
    ids = encode_start(tokenizer, TEXT, length)
    start_prefix_as(loaded, ids)
    rest = tokenizer.encode_text("它的弱点是什么？飞行。")
    with torch.no_grad():
        behind_prefix = loaded(input_ids=torch.tensor([rest])).logits
        with loaded.prefix_disabled():
            alone = loaded(input_ids=torch.tensor([rest])).logits
            behind_text = loaded(input_ids=torch.tensor([ids + rest])).logits[:, length:]
    torch.testing.assert_close(behind_prefix, behind_text, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(behind_prefix, alone, atol=0.1)


def test_the_loss_of_a_continuation_falls_with_what_the_prefix_says(tiny_folder, tokenizer):
    """Text about one Pokémon makes its own repetition likelier than text about another one does."""
    loaded = load_model(tiny_folder, pre_seq_len=12, dtype=torch.float32, device="cpu")
    rest = torch.tensor([tokenizer.encode_text("喷火龙的分类是火焰宝可梦。喷火龙")])
    losses = {}
    for name in ("喷火龙", "皮卡丘"):
        start_prefix_as(loaded, encode_start(tokenizer, f"{name}的分类是火焰宝可梦。", 12))
        with torch.no_grad():
            losses[name] = loaded(input_ids=rest, labels=rest).loss.item()
    assert losses["喷火龙"] < losses["皮卡丘"] - 0.1


def test_values_and_keys_are_those_of_the_layers(model):
    """Values as the layer's own projection makes them; keys rotated to the positions -3 to -1."""
    loaded = load_model(model, pre_seq_len=3, dtype=torch.float32, device="cpu")
    ids = [64, 17, 99]
    seen = []
    attention = loaded.model.layers[1].self_attn
    hook = attention.v_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    rows = keys_and_values(loaded, ids).view(3, loaded.config.num_layers, 2, loaded.config.multi_query_group_num, -1)
    hook.remove()
    torch.testing.assert_close(rows[:, 1, 1].flatten(1), seen[0][0])
    positions = torch.arange(-3, 0)[None]
    embedded = loaded.model.embed_tokens(torch.tensor([ids]))
    layer = loaded.model.layers[0]
    keys = layer.self_attn.k_proj(layer.input_layernorm(embedded)).view(1, 3, 2, 8).transpose(1, 2)
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    cos, sin = loaded.model.rotary_emb(embedded, positions)
    rotated = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    torch.testing.assert_close(rows[:, 0, 0], rotated[0].transpose(0, 1))


def test_a_text_is_repeated_or_cut(tokenizer):
    start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    words = tokenizer.encode_text(TEXT)
    assert encode_start(tokenizer, TEXT, 2 + len(words)) == start + words
    assert encode_start(tokenizer, TEXT, 2 + 2 * len(words) + 1) == start + words + words + words[:1]
    assert encode_start(tokenizer, TEXT, 4) == start + words[:2]
    assert encode_start(tokenizer, TEXT, 1) == start[:1]
    with pytest.raises(ValueError, match="the text that the prefix shall start as is empty"):
        encode_start(tokenizer, "", 4)


def test_only_a_prefix_that_is_stored_can_start_as_a_text(model):
    projected = load_model(model, pre_seq_len=4, prefix_projection=True, device="cpu")
    with pytest.raises(ValueError, match="only a prefix without projection"):
        start_prefix_as(projected, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="the prefix has 4 positions, and the text 3 tokens"):
        start_prefix_as(load_model(model, pre_seq_len=4, device="cpu"), [1, 2, 3])


# The flags


@pytest.mark.parametrize("is_file", [False, True])
def test_a_run_starts_from_the_text(is_file, model, data, tmp_path):
    text = TEXT
    if is_file:
        text = tmp_path / "start.txt"
        text.write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\n")
    options = {"pre_seq_len": 6, "prefix_init_text": text, "max_steps": 1, "learning_rate": 1e-12}
    assert train(model, data, tmp_path / "o", **options) == 0
    ids = encode_start(load_tokenizer(model), TEXT, 6)
    expected = keys_and_values(load_model(model, device="cpu"), ids)
    saved = load_file(tmp_path / "o" / "prefix_encoder.safetensors")["embedding.weight"]
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"bf16": True}, pytest.param({"quantization_bit": 4}, marks=pytest.mark.thorough)])
def test_a_base_in_low_precision_gives_its_own_keys(options, model, data, tmp_path):
    if "quantization_bit" in options:
        pytest.importorskip("bitsandbytes")
    settings = decide(model, data, tmp_path / "o", pre_seq_len=6, prefix_init_text=TEXT, **options)
    weight = methods.prepare_model(settings).prefix_encoder.embedding.weight
    exact = keys_and_values(load_model(model, device="cpu"), encode_start(load_tokenizer(model), TEXT, 6))
    assert weight.dtype == torch.float32
    assert (weight - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_projection": True}, "an MLP computes the prefix, which cannot start as a text"),
        ({"prefix_init_std": 0.5}, "--prefix_init_std is of a random prefix"),
        ({"prefix_init_text": "nowhere.txt"}, "--prefix_init_text nowhere.txt does not exist"),
        ({"pre_seq_len": None, "finetuning_type": "lora"}, "--prefix_init_text belongs to P-Tuning v2"),
        ({"prefix_dropout": 1.0}, "--prefix_dropout is 1"),
    ],
)
def test_contradictions_are_refused(options, message, model, data, tmp_path, capsys):
    options = {"pre_seq_len": 4, "prefix_init_text": TEXT} | options
    assert train(model, data, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err


def test_an_empty_text_is_refused(model, data, tmp_path):
    given, notices = parse_given(flags(model, data, tmp_path / "o", pre_seq_len=4))
    with pytest.raises(UserError, match="--prefix_init_text is empty"):
        decide_settings(given | {"prefix_init_text": " "}, notices)


def test_a_text_and_a_checkpoint_exclude_each_other(model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "a", pre_seq_len=4, max_steps=1) == 0
    options = {"ptuning_checkpoint": tmp_path / "a", "prefix_init_text": TEXT}
    assert train(model, data, tmp_path / "b", **options) == 2
    assert "--prefix_init_text is for a new prefix, --ptuning_checkpoint has one" in capsys.readouterr().err


def test_dropout_is_set_stored_and_taken_up(model, data, tmp_path):
    def dropout(**options):
        settings = decide(model, data, tmp_path / "x", **options)
        return methods.prepare_model(settings).prefix_encoder.dropout.p

    assert dropout(pre_seq_len=4) == 0.1  # the original's
    assert dropout(pre_seq_len=4, prefix_dropout=0.3) == 0.3
    assert train(model, data, tmp_path / "o", pre_seq_len=4, prefix_dropout=0.0, max_steps=2, save_steps=1) == 0
    assert read_prefix_config(tmp_path / "o").prefix_dropout == 0.0
    assert dropout(ptuning_checkpoint=tmp_path / "o") == 0.0
    assert dropout(ptuning_checkpoint=tmp_path / "o", prefix_dropout=0.2) == 0.2


def test_without_dropout_a_step_is_the_same_every_time(model, data, tmp_path):
    """The only random numbers of a step are the dropout's."""
    weights = {}
    for name, share in (("a", 0.0), ("b", 0.0), ("c", 0.5)):
        options = {"pre_seq_len": 4, "prefix_dropout": share, "max_steps": 2}
        assert train(model, data, tmp_path / name, **options) == 0
        weights[name] = load_file(tmp_path / name / "prefix_encoder.safetensors")["embedding.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])
