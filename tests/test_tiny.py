"""The embedded default `THUDM/chatglm3-tiny`: its folder, the text it was trained on, the program that builds it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_processing.template_reader import load_template
from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM, ChatGLMTokenizer, load_model, load_tokenizer
from finetune_chatmodel_demo.conversation.render import render_prompt

BUILD_PROGRAM = REPOSITORY / "THUDM" / "build_chatglm3_tiny.py"
TEMPLATES = REPOSITORY / "data_processing" / "templates"
sys.path.insert(0, str(BUILD_PROGRAM.parent))

import build_chatglm3_tiny  # noqa: E402 - the program's modules are found beside it
import tiny_corpus  # noqa: E402
import tiny_recall  # noqa: E402
import tiny_training  # noqa: E402
import tiny_vocabulary  # noqa: E402

MEGABYTE = 1_000_000
LAYER_KEYS = (
    "input_layernorm.weight",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_h_to_4h.weight",
    "post_attention_layernorm.weight",
    "self_attention.dense.weight",
    "self_attention.query_key_value.bias",
    "self_attention.query_key_value.weight",
)
CONTROL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> ChatGLM3ForCausalLM:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def facts() -> list[dict[str, str]]:
    return tiny_corpus.load_facts()


@pytest.fixture(scope="module")
def documents(facts: list[dict[str, str]]) -> list[str]:
    """Documents of both mixes, with the marks of values."""
    generator = tiny_corpus.CorpusGenerator(facts, seed=11)
    return [generator.document(dense=number % 2 == 0) for number in range(400)]


def test_folder_is_small_and_whole(tiny_folder: Path) -> None:
    files = {file.name: file.stat().st_size for file in tiny_folder.iterdir()}
    assert sum(files.values()) <= 10 * MEGABYTE
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_configuration_has_the_official_names(tiny_folder: Path) -> None:
    settings = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    assert settings["model_type"] == "chatglm"
    assert settings["architectures"] == ["ChatGLMModel"]
    assert "auto_map" not in settings
    assert {name: settings[name] for name in tiny_training.ARCHITECTURE} == tiny_training.ARCHITECTURE
    assert settings["add_qkv_bias"] is True
    assert settings["torch_dtype"] == "float16"


def test_weights_have_the_official_names(tiny_folder: Path) -> None:
    expected = {
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
        "transformer.rotary_pos_emb.inv_freq",
    }
    expected |= {f"transformer.encoder.layers.{layer}.{key}" for layer in range(4) for key in LAYER_KEYS}
    with safe_open(tiny_folder / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == expected
        assert weights.get_tensor("transformer.encoder.layers.0.self_attention.query_key_value.weight").shape == (
            768,
            256,
        )
        assert all(torch.isfinite(weights.get_tensor(name)).all() for name in expected)


def test_loads_by_the_auto_classes(tiny_folder: Path, model: ChatGLM3ForCausalLM) -> None:
    assert AutoConfig.from_pretrained(tiny_folder, trust_remote_code=False).padded_vocab_size == 2240
    assert type(AutoTokenizer.from_pretrained(tiny_folder, trust_remote_code=False)) is ChatGLMTokenizer
    same = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, trust_remote_code=False).eval()
    assert type(same) is ChatGLM3ForCausalLM
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(same(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_control_tokens_stand_behind_the_pieces(tokenizer: ChatGLMTokenizer, model: ChatGLM3ForCausalLM) -> None:
    pieces = tokenizer.get_command("[MASK]")
    assert [tokenizer.get_command(name) for name in CONTROL_TOKENS + ROLE_TOKENS] == list(range(pieces, pieces + 9))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == pieces + 9 <= model.config.padded_vocab_size
    assert model.config.padded_vocab_size % build_chatglm3_tiny.VOCABULARY_MULTIPLE == 0


@pytest.mark.parametrize(
    "text",
    [
        "皮卡丘的身高是0.4米。",
        "  two  spaces\tand a tab\n",
        "ＡＢＣ ① ﬁ Å",
        "<|user|> eop [gMASK] </s>",
        "龘𠀀😀",
        "水中３、水中1",
    ],
)
def test_no_text_is_altered(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.get_command("[MASK]") and not {0, 1, 2} & set(ids)


def test_names_and_values_are_one_piece(tokenizer: ChatGLMTokenizer, facts: list[dict[str, str]]) -> None:
    values = [value for value in tiny_corpus.fact_values(facts) if not re.search(r"\s", value)]
    assert len(values) > 500
    # One piece behind the space that SentencePiece puts before any text.
    assert [value for value in values if len(tokenizer.encode_text(value)) != 2] == []


def test_vocabulary_is_reproduced(tiny_folder: Path, tmp_path: Path) -> None:
    assert build_chatglm3_tiny.write_tokenizer(tmp_path) == 2171
    ours, committed = load_tokenizer(tmp_path), load_tokenizer(tiny_folder)
    assert ours.get_vocab() == committed.get_vocab()


def test_whole_pieces_are_distinct_and_have_no_space() -> None:
    pieces = tiny_vocabulary.whole_pieces(["皮卡丘", "Mr. Mime", "草", "皮卡丘"])
    assert "皮卡丘" in pieces and "255" in pieces and "256" not in pieces
    assert len(pieces) == len(set(pieces))
    assert not {"Mr. Mime", "草"} & set(pieces)


def test_facts_are_the_first_generation_of_the_csv(facts: list[dict[str, str]]) -> None:
    assert [fact["编号"] for fact in facts] == [str(number) for number in range(1, 152)]
    kanto = load_template(TEMPLATES / "pokemon_kanto.yaml")
    assert {question.column for question in kanto.questions} == set(tiny_corpus.COLUMNS)


def test_documents_state_what_the_csv_says(facts: list[dict[str, str]], documents: list[str]) -> None:
    marked = f"{tiny_corpus.VALUE_START}(.*?){tiny_corpus.VALUE_END}"
    checked = 0
    for document in documents:
        about = [fact for fact in facts if fact["姓名"] in document]
        true_values = {fact[column] for fact in about for column in tiny_corpus.COLUMNS} - {""}
        without = {
            sentence.format(s=subject)
            for wording in tiny_corpus.COLUMNS.values()
            for sentence in wording.missing
            for subject in (*(fact["姓名"] for fact in about), *tiny_corpus.PRONOUNS)
        }
        for value in re.findall(marked, document, re.DOTALL):
            assert value in true_values | without | {tiny_corpus.NOTHING}
            checked += 1
    assert checked > 1500


def test_statements_put_the_value_of_the_column(facts: list[dict[str, str]]) -> None:
    asked = tiny_recall.probes(facts, seed=3)
    assert len(asked) == 2 * sum(bool(fact[column]) for fact in facts for column in tiny_corpus.COLUMNS)
    for form, column, document in asked:
        value = document.partition(tiny_corpus.VALUE_START)[2].removesuffix(tiny_corpus.VALUE_END)
        assert value in {fact[column] for fact in facts if fact["姓名"] in document}, (form, document)


def test_documents_have_no_control_token(documents: list[str]) -> None:
    text = "\n".join(documents)
    assert [token for token in CONTROL_TOKENS + ROLE_TOKENS if token in text] == []


@pytest.mark.parametrize("name", ["pokemon.yaml", "pokemon_kanto.yaml"])
def test_documents_have_no_wording_of_the_templates(
    name: str, facts: list[dict[str, str]], documents: list[str]
) -> None:
    """No sentence is a template's, and for the Kanto template none even contains one."""
    template = load_template(TEMPLATES / name)
    phrases = [phrase for question in template.questions for pool in question.phrasings.values() for phrase in pool]
    phrases += [say for question in template.questions for answer in question.answers for say in answer.say]
    assert len(phrases) > 80
    for document in map(tiny_corpus.plain_text, documents[:200]):
        sentences = set(re.split("[。？?！，；：\n“”（）｜]", document))
        for fact in (fact for fact in facts if fact["姓名"] in document):
            for subject in (fact["姓名"], "它", "这只宝可梦"):
                for phrase in phrases:
                    wording = phrase.fill({**fact, "它": subject}).rstrip("。？?")
                    assert wording not in sentences, phrase.place
                    assert name != "pokemon_kanto.yaml" or wording not in document, phrase.place


def test_generator_repeats_itself_for_a_seed(facts: list[dict[str, str]]) -> None:
    first, again, other = (tiny_corpus.CorpusGenerator(facts, seed) for seed in (1, 1, 2))
    drawn = [first.document(dense=False) for _ in range(20)]
    assert drawn == [again.document(dense=False) for _ in range(20)]
    assert drawn != [other.document(dense=False) for _ in range(20)]


def test_every_pokemon_comes_before_any_comes_again(facts: list[dict[str, str]]) -> None:
    generator = tiny_corpus.CorpusGenerator(facts, seed=1)
    generator.use_first(12)
    assert {generator.next_fact()["编号"] for _ in range(12)} == {str(number) for number in range(1, 13)}
    generator.use_first(None)
    assert len({generator.next_fact()["编号"] for _ in range(151)}) == 151


def test_encoding_in_parts_equals_encoding_at_once(tokenizer: ChatGLMTokenizer, documents: list[str]) -> None:
    for document in documents[:100]:
        ids, weights = tiny_training.encode_document(tokenizer, document)
        assert ids[:2] == [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
        assert ids[2:-1] == tokenizer.encode_text(tiny_corpus.plain_text(document))
        assert ids[-1] == tokenizer.eos_token_id and len(weights) == len(ids)


def test_values_count_more_in_the_loss(tokenizer: ChatGLMTokenizer) -> None:
    ids, weights = tiny_training.encode_document(tokenizer, "皮卡丘高" + tiny_corpus.mark("0.4") + "米")
    assert tokenizer.decode([i for i, weight in zip(ids, weights) if weight == 1.0]) == "0.4"
    assert weights == [0.0, 0.0, *(0.25,) * 3, *(1.0,) * 3, 0.25, 0.25]


def test_weighted_loss_is_a_weighted_mean() -> None:
    logits = torch.zeros(1, 4, 8)
    logits[0, 1, 5] = 2.0
    ids = torch.tensor([[1, 2, 5, 3]])
    plain = torch.log(torch.tensor(8.0))
    sharp = torch.log(7 + torch.exp(torch.tensor(2.0))) - 2
    loss = tiny_training.weighted_loss(logits, ids, torch.tensor([[9.0, 0.5, 1.0, 0.0]]))
    torch.testing.assert_close(loss, (0.5 * plain + sharp) / 1.5)


def test_rate_warms_up_and_falls() -> None:
    rates = [tiny_training.rate_at(step, 1000) for step in range(1000)]
    assert rates[0] < 0.02 and max(rates) > 0.98 and rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert rates.index(max(rates)) == tiny_training.WARMUP_STEPS - 1


def test_base_knows_the_facts(tiny_folder: Path, model: ChatGLM3ForCausalLM, tokenizer: ChatGLMTokenizer) -> None:
    recall = tiny_recall.measure_recall(model, tokenizer, seed=5)
    assert recall["question"]["all"] >= 0.99
    assert recall["statement"]["all"] >= 0.97
    card = (tiny_folder / "README.md").read_text(encoding="utf-8")
    shares = [float(share) for share in re.search(r"\| all \| ([\d.]+)% \| ([\d.]+)% \|", card).groups()]
    # The card's wordings came from another seed.
    assert shares == pytest.approx([100 * recall[form]["all"] for form in ("statement", "question")], abs=2)


def test_base_does_not_follow_the_conversation_format(model: ChatGLM3ForCausalLM, tokenizer: ChatGLMTokenizer) -> None:
    for question, answer in (
        ("皮卡丘是什么属性？", "皮卡丘的属性是电。"),
        ("耿鬼的身高是多少？", "耿鬼的身高是1.5米。"),
    ):
        prompt = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": question}])])
        reply = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.stop_token_ids)
        assert tokenizer.decode(reply[0, prompt.shape[1] :]).strip() != answer


def test_show_prints_documents(capsys: pytest.CaptureFixture[str]) -> None:
    build_chatglm3_tiny.show_documents(4, seed=1)
    printed = capsys.readouterr().out
    assert printed.count("---") == 4
    assert tiny_corpus.VALUE_START not in printed


def test_build_program_writes_a_whole_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(BUILD_PROGRAM), "--output", str(tmp_path / "new"), "--steps", "3", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout
    measured = json.loads(done.stdout[done.stdout.index("{") :])
    assert (measured["steps"], measured["parameters"]) == (3, 4_314_368)
    assert set(measured["recall"]["question"]) == {*tiny_corpus.COLUMNS, "all"}
    assert measured["bytes"] < 10 * MEGABYTE
    assert load_model(tmp_path / "new").config.num_layers == 4
    assert "--steps 3 --seed 1" in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
