"""inference.py: which model the flags come to, one shot, pipes, the chat, and every error that a user can make."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adapter_helpers import make_adapter
from conftest import read_light_help
from conversation_helpers import assistant, message, user
from generation_helpers import PREFIX_LENGTH, build_prefix_folder, build_random_folder, greedy_without_cache

from finetune_chatmodel_demo import inference
from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, load_adapter, save_adapter
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import render_prompt
from finetune_chatmodel_demo.generation import choose as choosing
from finetune_chatmodel_demo.generation.choose import choose_model
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.generation.session import ChatSession
from finetune_chatmodel_demo.generation.terminal import HELP, TerminalChat

SCRIPT = Path(inference.__file__)
QUESTION = "皮卡丘是什么属性？"


def reference_reply(model, tokenizer, messages, count, prompt_format="multi-turn"):
    """What must be answered: argmax over the whole text, id by id."""
    prompt = render_prompt(tokenizer, messages, prompt_format=prompt_format)
    ids = greedy_without_cache(model, prompt, tokenizer.stop_token_ids, count)
    return read_reply(tokenizer, ids, prompt_format).text


def choose(*flags):
    return choose_model(inference.build_parser().parse_args([*map(str, flags)]))


def run_main(capsys, *flags):
    code = inference.main([*map(str, flags)])
    return (code, *capsys.readouterr())


# --- which model


def test_everything_comes_from_the_checkpoint(base, prefix):
    choice = choose("--pt-checkpoint", prefix)
    assert (choice.model, choice.tokenizer, choice.prefix) == (str(base), str(base), prefix)
    assert choice.prompt_format == "multi-turn"
    assert f"base model: {base} (recorded in the checkpoint)" in choice.notices


def test_underscores_and_an_equal_length_are_accepted(base, prefix):
    choice = choose(
        "--pt_checkpoint", prefix, "--pt_pre_seq_len", PREFIX_LENGTH, "--model", base, "--max_new_tokens", 5
    )
    assert choice.prefix == prefix


def test_the_newest_checkpoint_of_a_run_is_used(tmp_path, base, prefix):
    for step in (9, 10, 100):
        shutil.copytree(prefix, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()
    choice = choose("--pt-checkpoint", tmp_path, "--model", base)
    assert choice.prefix == tmp_path / "checkpoint-100"
    assert f"{tmp_path} holds checkpoints: using the newest, checkpoint-100" in choice.notices
    shutil.copytree(prefix, tmp_path, dirs_exist_ok=True)
    assert choose("--pt-checkpoint", tmp_path, "--model", base).prefix == tmp_path


def test_a_fully_tuned_run_is_a_model(tmp_path, base):
    shutil.copytree(base, tmp_path / "checkpoint-5")
    assert choose("--model", tmp_path).model == str(tmp_path / "checkpoint-5")


def test_a_fully_tuned_model_may_record_its_format(tmp_path, base):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"prompt_format": "input-output"}), encoding="utf-8")
    assert choose("--model", tmp_path).prompt_format == "input-output"


def test_the_format_is_the_recorded_one_unless_overridden(tmp_path, base):
    build_prefix_folder(tmp_path, base, prompt_format="input-output")
    assert choose("--pt-checkpoint", tmp_path, "--model", base).prompt_format == "input-output"
    overridden = choose("--pt-checkpoint", tmp_path, "--model", base, "--format", "multi-turn")
    assert overridden.prompt_format == "multi-turn"
    assert "--format multi-turn, although the checkpoint was trained with input-output" in overridden.notices


def test_an_original_checkpoint_is_multi_turn_and_says_so(golden, base, monkeypatch):
    choice = choose("--pt-checkpoint", golden / "tiny_prefix_checkpoint", "--model", base)
    assert choice.prompt_format == "multi-turn"
    assert any("does not say which prompt format" in notice for notice in choice.notices)


def test_a_recorded_base_that_moved_is_looked_for_in_thudm(tmp_path, base, monkeypatch):
    monkeypatch.setattr(choosing, "REPOSITORY", tmp_path)
    shutil.copytree(base, tmp_path / "THUDM" / "my-base")
    folder = build_prefix_folder(tmp_path / "prefix", base, base_model="/root/elsewhere/THUDM/my-base")
    assert choose("--pt-checkpoint", folder).model == str(tmp_path / "THUDM" / "my-base")
    shutil.rmtree(tmp_path / "THUDM")
    with pytest.raises(UserError, match=r"was trained on /root/elsewhere/THUDM/my-base, which is not on this machine"):
        choose("--pt-checkpoint", folder)


def test_default_models_in_their_order(tmp_path, base, monkeypatch):
    folders = (tmp_path / "chatglm3-6b", tmp_path / "chatglm3-tiny")
    monkeypatch.setattr(choosing, "DEFAULT_MODELS", folders)
    with pytest.raises(UserError, match=r"no --model was given, and there is none at .*chatglm3-6b or .*chatglm3-tiny"):
        choose()
    for folder in reversed(folders):
        shutil.copytree(base, folder)
        choice = choose()
        assert choice.model == str(folder)
        assert f"model: {folder} (no --model was given)" in choice.notices


def test_folders_are_also_found_below_the_repository(tmp_path, base, monkeypatch):
    monkeypatch.setattr(choosing, "REPOSITORY", tmp_path / "repository")
    shutil.copytree(base, tmp_path / "repository" / "THUDM" / "m")
    monkeypatch.chdir(tmp_path)
    assert choose("--model", "THUDM/m").model == str(tmp_path / "repository" / "THUDM" / "m")


def test_without_a_gpu_the_cpu_is_used_and_that_is_said(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in ([], ["--device", "cuda"]):
        choice = choose("--model", base, *flags)
        assert choice.device == "cpu"
        assert "there is no GPU that torch can use: running on the CPU" in choice.notices
    assert choose("--model", base, "--device", "cpu").notices == ()


# --- LoRA adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return make_adapter(tmp_path_factory.mktemp("adapter"), base, prompt_format="input-output")


def test_an_adapter_brings_its_base_and_its_format(base, adapter):
    for flag in ("--adapter", "--adapter-name-or-path", "--adapter_name_or_path", "--adapter-checkpoint"):
        choice = choose(flag, adapter)
        assert (choice.model, choice.adapter, choice.prefix) == (str(base), adapter, None)
        assert (choice.prompt_format, choice.tuned) == ("input-output", "adapter")
        assert f"base model: {base} (recorded in the checkpoint)" in choice.notices


def test_either_flag_takes_both_kinds_of_checkpoint(adapter, prefix):
    choice = choose("--pt-checkpoint", adapter)
    assert (choice.adapter, choice.prefix) == (adapter, None)
    assert f"{adapter} is a LoRA adapter: it is used as with --adapter" in choice.notices
    choice = choose("--adapter", prefix)
    assert (choice.adapter, choice.prefix) == (None, prefix)
    assert f"{prefix} is a prefix checkpoint: it is used as with --pt-checkpoint" in choice.notices


def test_the_newest_adapter_of_a_run_is_used(tmp_path, adapter):
    for step in (9, 10):
        shutil.copytree(adapter, tmp_path / f"checkpoint-{step}")
    assert choose("--adapter", tmp_path).adapter == tmp_path / "checkpoint-10"


def test_an_adapter_answers_as_it_was_trained(capsys, base, adapter, prefix_model, tokenizer):
    adapted = load_adapter(load_model(base, device="cpu"), adapter)
    expected = reference_reply(adapted, tokenizer, [user(QUESTION)], 12, "input-output")
    flags = ["--adapter", adapter, "--prompt", QUESTION, "--max-new-tokens", 12]
    code, out, err = run_main(capsys, *flags)
    assert (code, out) == (0, expected + "\n")
    assert f"{base} + adapter {adapter}, input-output prompts" in err
    with adapted.disable_adapter():
        assert reference_reply(adapted, tokenizer, [user(QUESTION)], 12, "input-output") != expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_adapters_and_prefixes_on_quantized_bases(capsys, base, adapter, prefix, tokenizer, bits):
    pytest.importorskip("bitsandbytes")
    load = {"quantization_bit": bits, "device": "cpu"}
    models = {
        ("--adapter", adapter, "input-output"): load_adapter(load_model(base, **load), adapter),
        ("--pt-checkpoint", prefix, "multi-turn"): load_model(base, pt_checkpoint=prefix, **load),
    }
    for (flag, folder, prompt_format), quantized in models.items():
        # Not the argmax over the whole text: int8 rounds activations by row, so a cache changes the last digits.
        session = ChatSession(quantized, tokenizer, prompt_format=prompt_format, max_new_tokens=8)
        flags = ["--prompt", QUESTION, "--max-new-tokens", 8, "--quantization-bit", bits, "--device", "cpu"]
        code, out, err = run_main(capsys, flag, folder, *flags)
        assert (code, out) == (0, "".join(session.reply(QUESTION)) + "\n")
        assert f"{base} in {bits} bits + " in err


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_knows_that_its_base_was_quantized(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    save_adapter(add_adapter(load_model(base, quantization_bit=4, device="cpu")), tmp_path, base_model=str(base))
    notice = "the adapter was trained on the base in 4 bits; --quantization-bit 4 loads it so"
    assert notice in choose("--adapter", tmp_path).notices
    assert notice not in choose("--adapter", tmp_path, "--quantization-bit", 4).notices


def test_reward_models_do_not_chat(capsys, tmp_path, base):
    folder = make_adapter(tmp_path / "adapter", base, head="score")
    code, _, err = run_main(capsys, "--adapter", folder, "--prompt", "x")
    assert code == 2
    assert err.splitlines()[-1].endswith(
        f"error: {folder} belongs to a reward model (stage rm): it scores texts and cannot write any",
    )
    whole = tmp_path / "whole"
    load_model(base, device="cpu", head="score").save_pretrained(whole)
    code, _, err = run_main(capsys, "--model", whole, "--prompt", "x")
    assert code == 2
    assert err.splitlines()[-1].endswith(
        f"error: --model {whole} is a reward model (stage rm): it scores texts and cannot write any",
    )


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pt-checkpoint", "nowhere"], "--pt-checkpoint nowhere: no such folder; give the --output_dir"),
        (["--pt-checkpoint", "{empty}"], "is not a prefix checkpoint: it holds nothing"),
        (["--pt-checkpoint", "{base}"], "holds a whole model, not a prefix checkpoint; give it as --model"),
        (["--model", "{prefix}"], "is a prefix checkpoint; give it as --pt-checkpoint"),
        (["--model", "{empty}"], "holds no weights (found: nothing); THUDM/README.md"),
        (["--model", "/nowhere/at/all"], "is not a folder"),
        (["--pt-checkpoint", "{prefix}", "--pt-pre-seq-len", "128"], "has 6 positions, --pt-pre-seq-len says 128"),
        (["--model", "{base}", "--pt-pre-seq-len", "128"], "describes a prefix, but there is no --pt-checkpoint"),
        (["--pt-checkpoint", "{golden}", "--model", "{base}"], "another base model"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such folder; give the --output_dir"),
        (["--adapter", "{empty}"], "is not a LoRA adapter: it holds nothing"),
        (["--adapter", "{base}"], "holds a whole model, not a LoRA adapter; give it as --model"),
        (["--model", "{adapter}"], "is a LoRA adapter; give it as --adapter"),
        (["--adapter", "{adapter}", "--pt-checkpoint", "{prefix}"], "--pt-checkpoint and --adapter exclude each other"),
        (["--adapter", "{adapter}", "--pt-pre-seq-len", "6"], "describes a prefix, but"),
        (["--adapter", "{adapter}", "--model", "{tiny}"], "was trained on another base model than"),
        (["--model", "{base}", "--device", "gpu"], "--device gpu is unknown; use cuda"),
        (["--model", "{base}", "--tokenizer", "{empty}"], "has no tokenizer.model"),
        (["--model", "no/model"], "no/model: there is no such folder, and as a name on the hub: "),
        (["--model", "{base}", "--prompt", " "], "--prompt is empty"),
        (["--model", "{base}", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--model", "{base}", "--prompt", "长" * 300], "shorten the question"),
        (["--model", "{base}", "--format", "input-output", "--system", "s"], "--system has no place"),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_to_do(
    capsys, tmp_path, tiny_folder, golden, base, prefix, adapter, flags, message
):
    places = {"empty": tmp_path, "base": base, "prefix": prefix, "adapter": adapter, "tiny": tiny_folder}
    places["golden"] = golden / "tiny_prefix_checkpoint"
    code, out, err = run_main(capsys, *(flag.format(**places) for flag in flags))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_tokenizer_of_another_model_is_refused(capsys, tmp_path, tiny_folder):
    other = build_random_folder(tmp_path, tiny_folder, vocabulary=300)
    code, _, err = run_main(capsys, "--model", other, "--prompt", "x")
    assert code == 2
    assert "only 300; use the tokenizer that belongs to the model" in err


def test_a_full_gpu_is_explained(capsys, monkeypatch, base):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(inference, "load_choice", fail)
    code, _, err = run_main(capsys, "--model", base, "--prompt", "x")
    assert code == 2
    assert "the memory is full (tried to allocate 2 GiB); close other programs" in err.splitlines()[-1]


def test_several_prompts_are_answered_one_by_one(capsys, base, prefix):
    flags = ("--model", base, "--pt-checkpoint", prefix, "--max-new-tokens", "8")
    questions = ("皮卡丘是什么？", "妙蛙种子是什么？")
    alone = [run_main(capsys, *flags, "--prompt", question)[1] for question in questions]
    code, out, _ = run_main(capsys, *flags, "--prompt", questions[0], "--prompt", questions[1])
    assert (code, out) == (0, "".join(alone))


def test_the_folder_of_a_run_is_enough(capsys, base, prefix, tmp_path):
    question = ("--prompt", "皮卡丘是什么？", "--max-new-tokens", "8")
    for folder, flag, rest in ((prefix, "--pt-checkpoint", ("--model", base)), (base, "--model_name_or_path", ())):
        assert run_main(capsys, folder, *rest, *question)[:2] == run_main(capsys, flag, folder, *rest, *question)[:2]
    (tmp_path / "x.txt").write_text("x")
    for words, told in (
        ((tmp_path,), "holds no model, prefix or adapter: it holds x.txt"),
        ((tmp_path / "nowhere",), "is not a folder"),
        ((prefix, "--pt-checkpoint", prefix), "--pt-checkpoint is given as well"),
    ):
        code, _, err = run_main(capsys, *words, *question)
        assert code == 2 and told in err.splitlines()[-1]


def test_a_misspelt_local_folder_is_not_looked_up_on_the_hub(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    code, _, err = run_main(capsys, "--model", "output/x", "--prompt", "x")
    assert code == 2 and "output/x is not a folder" in err.splitlines()[-1]


def test_a_flag_that_would_win_over_its_twin_is_refused(capsys, base):
    with pytest.raises(SystemExit) as stopped:
        run_main(capsys, "--adapter", "a", "--adapter", "b", "--prompt", "x")
    assert stopped.value.code == 2
    assert "--adapter is given twice (a, then b)" in capsys.readouterr().err


# --- one shot and pipes


def test_one_shot_equals_the_argmax_reference(capsys, base, prefix, prefix_model, tokenizer):
    code, out, err = run_main(capsys, "--pt-checkpoint", prefix, "--prompt", QUESTION, "--max-new-tokens", 16)
    assert (code, out) == (0, reference_reply(prefix_model, tokenizer, [user(QUESTION)], 16) + "\n")
    assert f"{base} + prefix {prefix}, multi-turn prompts, on" in err


def test_the_system_prompt_is_used(capsys, prefix, prefix_model, tokenizer):
    flags = ["--pt-checkpoint", prefix, "--prompt", QUESTION, "--max-new-tokens", 16, "--system", "你是图鉴。"]
    expected = reference_reply(prefix_model, tokenizer, [message("system", "你是图鉴。"), user(QUESTION)], 16)
    assert run_main(capsys, *flags)[1] == expected + "\n"


def test_input_output_prompts(capsys, prefix, prefix_model, tokenizer):
    flags = ["--pt-checkpoint", prefix, "--prompt", QUESTION, "--max-new-tokens", 16, "--format", "input-output"]
    expected = reference_reply(prefix_model, tokenizer, [user(QUESTION)], 16, "input-output")
    _, out, err = run_main(capsys, *flags, "--seed", 1)
    assert out == expected + "\n"
    assert "input-output prompts (each question stands alone), on" in err
    assert "--seed changes nothing in greedy replies" in err


def test_sampling_flags_switch_sampling_on_and_seeds_repeat(capsys, prefix):
    flags = ["--pt-checkpoint", prefix, "--prompt", QUESTION, "--max-new-tokens", 16, "--temperature", 5, "--top-p", 1]
    replies = [run_main(capsys, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


def test_sampling_options():
    def options(*flags):
        return inference.sampling_options(inference.build_parser().parse_args([*flags]))

    plain = {"repetition_penalty": 1.0, "max_new_tokens": 128, "seed": None}
    assert options() == plain | {"do_sample": False}
    assert options("--do-sample") == plain | {"do_sample": True}
    assert options("--top_k", "3") == plain | {"do_sample": True, "top_k": 3}


def test_piped_prompts_are_one_conversation(base, prefix, prefix_model, tokenizer, tmp_path):
    piped = "\ufeff" + QUESTION + "\n\n它的弱点？\n"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--pt-checkpoint", prefix, "--max-new-tokens", "12", "--device", "cpu"],
        input=piped.encode(),
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    first = reference_reply(prefix_model, tokenizer, [user(QUESTION)], 12)
    history = [user(QUESTION), assistant(first), user("它的弱点？")]
    assert done.stdout.decode() == f"{first}\n{reference_reply(prefix_model, tokenizer, history, 12)}\n"


def test_piped_lines_may_be_gbk():
    assert list(inference.decode_lines(["皮卡丘\n".encode("gbk"), "喵".encode()])) == ["皮卡丘\n", "喵"]
    with pytest.raises(UserError, match="standard input line 1 is neither UTF-8 nor GBK"):
        list(inference.decode_lines([b"\xff\xff"]))


@pytest.mark.parametrize("program", ["inference.py", "evaluate.py"])
def test_help_is_light(program, tmp_path):
    assert "--pt-checkpoint" in read_light_help(SCRIPT.with_name(program), tmp_path)


# --- the chat


class FakeTerminal:
    """Hands out lines; an exception in the list is raised instead."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


def talk(session, *lines, out=None):
    out = out or io.StringIO()
    TerminalChat(session, FakeTerminal(*lines), out).run()
    return out.getvalue()


def test_the_chat_keeps_its_history_and_obeys(prefix_model, tokenizer):
    session = ChatSession(prefix_model, tokenizer, max_new_tokens=8)
    first = reference_reply(prefix_model, tokenizer, [user("一")], 8)
    second = reference_reply(prefix_model, tokenizer, [user("一"), assistant(first), user("二")], 8)
    shown = talk(session, "一", "", "二", "/history", "/clear", "/history", "一", "/exit", "三")
    assert shown == (
        f"assistant> {first}\nassistant> {second}\n"
        f"user: 一\nassistant: {first}\nuser: 二\nassistant: {second}\n"
        f"(the conversation was forgotten)\n(nothing was said yet)\nassistant> {first}\n"
    )


def test_system_prompt_in_the_chat(prefix_model, tokenizer):
    session = ChatSession(prefix_model, tokenizer, max_new_tokens=8)
    expected = reference_reply(prefix_model, tokenizer, [message("system", "图鉴"), user("一")], 8)
    shown = talk(session, "零", "/system 图鉴", "一", "/history", "/system -", "/system")
    assert shown.endswith(
        f"(system prompt: 图鉴)\nassistant> {expected}\nsystem: 图鉴\nuser: 一\nassistant: {expected}\n"
        "(system prompt: none)\n(system prompt: none)\n\n"
    )


def test_input_output_has_no_system_prompt(prefix_model, tokenizer):
    session = ChatSession(prefix_model, tokenizer, prompt_format="input-output", max_new_tokens=4)
    assert "it has no system prompt" in talk(session, "/system 图鉴")
    assert session.system is None


def test_commands_are_told_from_messages(prefix_model, tokenizer):
    session = ChatSession(prefix_model, tokenizer, max_new_tokens=4)
    shown = talk(session, "/help", "/claer", "//clear", "/observation x", "clear", "stop", "一")
    assert HELP in shown
    assert "(/claer is no command; /help lists them" in shown
    assert f"assistant> {reference_reply(prefix_model, tokenizer, [user('/clear')], 4)}\n" in shown
    assert "(the model has not called a tool)" in shown
    assert shown.endswith("(the conversation was forgotten)\n")


def test_a_question_that_is_too_long_does_not_end_the_chat(prefix_model, tokenizer):
    shown = talk(ChatSession(prefix_model, tokenizer, max_new_tokens=4), "长" * 300, "一")
    assert "leaves room for 252 before the answer" in shown
    assert f"assistant> {reference_reply(prefix_model, tokenizer, [user('一')], 4)}\n" in shown


class InterruptingOutput(io.StringIO):
    """Ctrl-C while the second piece of a reply is written."""

    pieces_left = 3

    def write(self, text):
        self.pieces_left -= 1
        if self.pieces_left == 0:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_ends_the_reply_and_not_the_program(prefix_model, tokenizer):
    session = ChatSession(prefix_model, tokenizer, max_new_tokens=40)
    whole = reference_reply(prefix_model, tokenizer, [user("一")], 40)
    shown = talk(session, "一", "/history", KeyboardInterrupt, out=InterruptingOutput())
    reply, *rest = shown.removeprefix("assistant> ").split("\n")
    assert 0 < len(reply) < len(whole)
    assert whole.startswith(reply)
    assert rest[0] == "(stopped)"
    assert "(/exit or Ctrl-D to leave)" in rest
    assert session.history[0] == user("一")


def test_ctrl_c_in_a_real_terminal(base, prefix):
    master, slave = pty.openpty()
    flags = ["--pt-checkpoint", prefix, "--max-new-tokens", "200", "--device", "cpu"]
    environment = os.environ | {"TERM": "dumb"}
    program = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    try:
        seen = read_until(master, "user> ")
        assert "/help lists the commands" in seen
        os.write(master, "一\n".encode())
        read_until(master, "assistant> ")
        program.send_signal(signal.SIGINT)
        read_until(master, "user> ")
        os.write(master, b"/exit\n")
        code = program.wait(timeout=60)
        assert code == 0, os.read(master, 4096).decode(errors="replace")
    finally:
        program.kill()
        os.close(master)


def read_until(descriptor, text, seconds=60):
    seen, end = b"", time.monotonic() + seconds
    while text.encode() not in seen:
        assert time.monotonic() < end, seen.decode(errors="replace")
        seen += os.read(descriptor, 1024)
    return seen.decode(errors="replace")
