"""PPO: the policy answers prompts, a reward scores the answers, and clipped updates make better ones likelier.

    python finetune_chatmodel_demo/finetune.py --stage ppo --finetuning_type lora --reward_model output/rm \\
        --train_file formatted_data/pokemon_conversations.jsonl --model_name_or_path THUDM/chatglm3-6b \\
        --adapter_name_or_path output/sft --output_dir output/ppo --max_new_tokens 128

A rollout has `per_device_train_batch_size × gradient_accumulation_steps × ppo_buffer_size` replies on each process.
Every one of its `ppo_epochs` passes makes `ppo_buffer_size` optimizer updates, each from batch size × accumulation
replies. `--max_steps` and everything else in steps counts updates. `--num_train_epochs N` is as many rollouts as it
takes to answer every prompt N times.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput, speed_metrics

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.collating import PadCollator
from finetune_chatmodel_demo.generation.session import prompt_budget
from finetune_chatmodel_demo.training.report import uses_checkpointing
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.ppo_figures import Figures, RolloutWatch
from finetune_chatmodel_demo.training.stages.ppo_math import kl_k3, policy_loss, value_loss
from finetune_chatmodel_demo.training.stages.ppo_rewards import build_reward
from finetune_chatmodel_demo.training.stages.ppo_rollouts import (
    Collector,
    PolicyWithValue,
    Rollout,
    order_of_prompts,
    seed_of,
)
from finetune_chatmodel_demo.training.stages.reference import (
    build_reference,
    disable_dropout,
    without_adapter_wrapper,
)
from finetune_chatmodel_demo.training.stages.stage_checks import sampling_of
from finetune_chatmodel_demo.training.trainer import NonFiniteLossError, RunTrainer

STATE_FILE = "ppo_state.pt"
ROLLOUT_FILE = "ppo_rollout_{process}.pt"
# Means over the tokens of an update. `policy_kl`: how far the policy has moved since the rollout.
UPDATE_FIGURES = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clip_fraction",
    "value_clip_fraction",
    "ratio",
    "policy_kl",
)


class PPOTrainer(RunTrainer):
    """Trains a policy on a reward; of transformers' Trainer it keeps the state, the log and the checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Any,
        validation_rows: Any | None = None,
    ) -> None:
        """Arguments: see `RunTrainer`; items of the rows have the prompt as `input_ids`.

        Raises:
            UserError: for a prompt that leaves no room for a reply, or a reward that cannot be loaded.
        """
        super().__init__(model, settings, tokenizer, PadCollator(tokenizer.pad_token_id), train_rows, validation_rows)
        _check_room((train_rows, validation_rows), model, settings.generation.max_new_tokens)
        disable_dropout(self.model)
        self.policy = PolicyWithValue(self.model, sampling_of(settings)["temperature"])
        self.collector = Collector(
            self.policy,
            build_reference(self.model, settings),
            build_reward(settings, tokenizer),
            settings,
            tokenizer,
            self.accelerator,
            self._describe_failure,
        )
        self.wrapped_policy: nn.Module = self.policy  # averages gradients over processes, once the training has begun
        self.figures, self.rollout_watch = Figures(), RolloutWatch(settings)
        self.rollout: Rollout | None = None
        self.rollouts_done = self.updates_done = 0  # whole rollouts, and updates of the one at work

    # The run

    @property
    def replies_of_update(self) -> int:
        """Replies of one process that an optimizer update learns from."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @property
    def replies_of_rollout(self) -> int:
        """Replies of all processes in a rollout."""
        return self.replies_of_update * self.settings.stage.ppo_buffer_size * self.args.world_size

    @property
    def updates_of_rollout(self) -> int:
        """Optimizer updates that learn from a rollout."""
        return self.settings.stage.ppo_epochs * self.settings.stage.ppo_buffer_size

    def count_steps(self) -> int:
        """Optimizer updates of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        rollouts = math.ceil(self.args.num_train_epochs * len(self.train_dataset) / self.replies_of_rollout)
        return max(1, rollouts) * self.updates_of_rollout

    def describe_steps(self, steps: int) -> dict[str, str]:
        """Lines of the table before the start: title → text."""
        stage, prompts = self.settings.stage, len(self.train_dataset)
        replies, updates = self.replies_of_rollout, self.updates_of_rollout
        sampling = ", ".join(f"{name} {value:g}" for name, value in sampling_of(self.settings).items())
        adaptive = f", adapted to a KL of {stage.ppo_target:g}" if stage.ppo_adaptive_kl else ""
        return {
            "steps": f"{steps} updates, {updates} ({stage.ppo_epochs} epochs × {stage.ppo_buffer_size}) a rollout of "
            f"{replies} replies = {steps / updates * replies / prompts:.2f} epochs of {prompts} prompts",
            "replies": f"at most {self.settings.generation.max_new_tokens} tokens, {sampling}",
            "reward": f"{stage.reward_model or stage.reward_function}, KL coefficient {stage.ppo_kl_coef:g}{adaptive}",
        }

    def train(self, resume_from_checkpoint: str | None = None, **_: Any) -> TrainOutput:
        """Rollouts and updates until the last step.

        Args:
            resume_from_checkpoint: a whole checkpoint of this stage; its weights are in the model already.

        Raises:
            NonFiniteLossError: when the loss or a probability is no number any more; names the prompts.
            RewardError: when the reward function fails.
        """
        self._begin(resume_from_checkpoint)
        first, started = self.state.global_step, time.time()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self.evaluate()
        losses = []
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            losses.append(self._step())
        steps = self.state.global_step - first
        replies = steps * self.replies_of_update * self.args.world_size
        metrics = speed_metrics("train", started, num_samples=replies, num_steps=steps)
        metrics["train_loss"] = sum(losses) / max(len(losses), 1)
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _begin(self, checkpoint: str | None) -> None:
        """Optimizer, schedule and state, new or from a checkpoint."""
        steps = self.count_steps()
        if uses_checkpointing(self.args):
            without_adapter_wrapper(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.create_optimizer()
        self.create_scheduler(steps)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.wrapped_policy = self.accelerator.prepare_model(self.policy, device_placement=False)
        self.state = (
            TrainerState()
            if checkpoint is None
            else TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        )
        self.state.compute_steps(self.args, steps)
        self.state.init_training_references(self, steps, max(1, round(self.args.num_train_epochs)), None)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        if checkpoint is not None:
            self._load_optimizer_and_scheduler(checkpoint)
            self._load_scaler(checkpoint)
            self._load_ppo_state(Path(checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the flags; the value head has a learning rate of its own."""
        if self.optimizer is None:
            super().create_optimizer(model)
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
            head = {"params": list(self.policy.value_head.parameters()), "weight_decay": 0.0}
            self.optimizer.add_param_group({**head, "lr": self.settings.stage.ppo_value_lr})
        return self.optimizer

    # A step

    def _collect(self) -> Rollout:
        """The next rollout of this process."""
        seed, process, processes = self.args.seed, self.args.process_index, self.args.world_size
        # Every generator starts anew, also those that a reward function may use: a resumed run draws the same.
        set_seed(seed_of(seed, self.rollouts_done, process))
        size, data_seed = self.replies_of_rollout, seed if self.args.data_seed is None else self.args.data_seed
        rows = order_of_prompts(len(self.train_dataset), self.rollouts_done * size, size, data_seed)[process::processes]
        prompts = [self.train_dataset.rows[row]["input_ids"] for row in rows]
        rollout, figures = self.collector.collect(prompts, rows)
        self.figures.add_rollout(figures)
        self.rollout_watch.look(figures)
        return rollout

    def _step(self) -> float:
        """One optimizer update, with a rollout before it when the last one is used up; returns the loss."""
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        if self.rollout is None:
            self.rollout = self._collect()
        replies = self._replies_of_this_update()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        figures = self.compute_gradients(replies)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        epoch_before = self.state.epoch
        self._advance()
        self.figures.add_update(figures)
        self.throughput.add(torch.stack([(replies.prompt_lengths + replies.reply_lengths).sum(), replies.mask.sum()]))
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._log_save_evaluate(learning_rate)
        if int(self.state.epoch) > int(epoch_before):
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._log_save_evaluate(learning_rate)
        return figures["loss"]

    def _replies_of_this_update(self) -> Rollout:
        """The replies that this update learns from: each once in a pass over the rollout, in random order."""
        size = self.replies_of_update
        epoch, place = divmod(self.updates_done, self.settings.stage.ppo_buffer_size)
        seed = seed_of(self.args.seed, self.rollouts_done, self.args.process_index, epoch)
        order = torch.randperm(len(self.rollout.scores), generator=torch.Generator().manual_seed(seed))
        return self.rollout.select(order[place * size : (place + 1) * size].to(self.args.device))

    def _advance(self) -> None:
        """Counts an update; after the last one of a rollout the next begins."""
        self.updates_done += 1
        whole = self.updates_of_rollout
        if self.updates_done == whole:
            self.rollout, self.updates_done = None, 0
            self.rollouts_done += 1
        rollouts = self.rollouts_done + self.updates_done / whole
        self.state.epoch = rollouts * self.replies_of_rollout / len(self.train_dataset)

    def compute_gradients(self, replies: Rollout) -> dict[str, float]:
        """Forward and backward in batches of --per_device_train_batch_size; gradients are clipped.

        Every token of the update weighs the same, whatever the batches and processes.

        Args:
            replies: of this process, all that the update learns from.

        Returns:
            The log's figures of the update, over all processes.

        Raises:
            NonFiniteLossError: names the rows.
        """
        self.policy.train()
        tokens = self.accelerator.reduce(replies.mask.sum(), reduction="sum")
        lengths = replies.prompt_lengths + replies.reply_lengths
        batches = lengths.argsort(descending=True, stable=True).split(self.args.per_device_train_batch_size)
        sums = torch.zeros(len(UPDATE_FIGURES), device=lengths.device)
        for number, chosen in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped_policy):
                sums += self._learn_from(replies.select(chosen), tokens)
        parameters = [value for value in self.policy.parameters() if value.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or float("inf"))
        if self.settings.precision != "float16" and not torch.isfinite(norm):
            failure = self._describe_failure(f"the gradient's norm is {float(norm)}", [replies.row_index])
            raise NonFiniteLossError(failure)
        figures = dict(zip(UPDATE_FIGURES, (self.accelerator.reduce(sums, reduction="sum") / tokens).tolist()))
        loss = figures["policy_loss"] + self.settings.stage.ppo_vf_coef * figures["value_loss"]
        return {"loss": loss, "grad_norm": float(norm), **figures}

    def _learn_from(self, batch: Rollout, tokens: torch.Tensor) -> torch.Tensor:
        """Gradients of a batch's share in the loss of an update.

        Args:
            batch: some of the update's replies.
            tokens: () reply tokens of the whole update on all processes.

        Returns:
            (figures,): sums over the batch's tokens, in the order of UPDATE_FIGURES.
        """
        stage, mask = self.settings.stage, batch.mask
        log_probs, entropies, values = self.wrapped_policy(batch.input_ids, batch.prompt_lengths, batch.reply_lengths)
        policy, clipped = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, stage.ppo_cliprange)
        value, value_clipped = value_loss(values, batch.values, batch.returns, mask, stage.ppo_cliprange_value)
        summed = policy + stage.ppo_vf_coef * value
        if not torch.isfinite(summed):
            raise NonFiniteLossError(self._describe_failure(f"the loss is {summed.item()}", [batch.row_index]))
        # Gradients are averaged over processes, and the loss is a mean over the tokens of all of them.
        self.accelerator.backward(summed * self.args.world_size / tokens)
        with torch.no_grad():
            moved = kl_k3(batch.log_probs, log_probs)
            ratio = ((log_probs - batch.log_probs).exp() * mask).sum()
            figures = [policy, value, entropies.sum(), clipped, value_clipped, ratio, moved.sum()]
            return torch.stack([figure.detach().float() for figure in figures])

    def _log_save_evaluate(self, learning_rate: float) -> None:
        """What the callbacks have asked for after a step."""
        if self.control.should_log:
            self.log({**self.figures.collect(), "learning_rate": learning_rate})
        is_best = False
        if self.control.should_evaluate:
            is_best = self._determine_best_metric(metrics=self.evaluate(), trial=None)
        if self.control.should_save or (is_best and self.args.save_strategy == "best"):
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # Validation

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The mean reward of greedy replies to the validation prompts, over all processes.

        Returns:
            `eval_reward`, `eval_reward_std`, `eval_reply_tokens`, `eval_hit_cap` and speeds.
        """
        started, data = time.time(), self.eval_dataset.rows
        chosen = list(range(self.args.process_index, len(data), self.args.world_size))
        prompts = [data[row]["input_ids"] for row in chosen]
        replies = self.collector.answer(prompts, chosen, is_greedy=True) if prompts else []
        scores = self.collector.score(prompts, replies).double()
        lengths = torch.tensor([[len(reply.ids), reply.hit_cap] for reply in replies], dtype=torch.float64)
        lengths = lengths.reshape(-1, 2).sum(dim=0).to(scores.device)
        sums = self.collector.sum(torch.cat([torch.stack([scores.sum(), (scores**2).sum()]), lengths]))
        reward, square, tokens, capped = (sums / len(data)).tolist()
        figures = {"reward": reward, "reward_std": max(square - reward**2, 0.0) ** 0.5}
        figures |= {"reply_tokens": tokens, "hit_cap": capped}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(data))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Beside them: value head, coefficient, running moments, and the rollout where one is at work."""
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        if self.rollout is not None:
            torch.save(self.rollout.state(), folder / ROLLOUT_FILE.format(process=self.args.process_index))
        if self.args.should_save:
            state = {
                "value_head": self.policy.value_head.state_dict(),
                "collector": self.collector.state(),
                "figures": dict(vars(self.figures)),
                "rollouts_done": self.rollouts_done,
                "updates_done": self.updates_done,
                "rollout_shape": self._rollout_shape(),
            }
            torch.save(state, folder / STATE_FILE)

    def _rollout_shape(self) -> dict[str, int]:
        """What must stay the same where a run is resumed in the middle of a rollout."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        shape = {name: getattr(self.args, name) for name in names} | {"processes": self.args.world_size}
        return shape | {name: getattr(self.settings.stage, name) for name in ("ppo_epochs", "ppo_buffer_size")}

    def _load_ppo_state(self, folder: Path) -> None:
        if not (folder / STATE_FILE).is_file():
            raise UserError(f"{folder} has no {STATE_FILE} (--save_only_model?): PPO cannot be resumed from it")
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.policy.value_head.load_state_dict(state["value_head"])
        self.collector.load(state["collector"])
        vars(self.figures).update(state["figures"])
        self.rollouts_done, self.updates_done = state["rollouts_done"], state["updates_done"]
        if self.updates_done == 0:
            return
        changed = {
            name: value for name, value in self._rollout_shape().items() if value != state["rollout_shape"][name]
        }
        if changed:
            now = ", ".join(f"{name} was {state['rollout_shape'][name]}, is {value}" for name, value in changed.items())
            raise UserError(
                f"{folder} was written in the middle of a rollout, which can only be continued as it was begun: {now}"
            )
        file = folder / ROLLOUT_FILE.format(process=self.args.process_index)
        saved = torch.load(file, map_location="cpu", weights_only=True)
        self.rollout = Rollout(**{name: value.to(self.args.device) for name, value in saved.items()})

    def describe_run(self) -> dict[str, Any]:
        """What decides the course of a run; a resumed run is compared with it."""
        names = [name for name in vars(self.settings.stage) if name.startswith(("ppo_", "reward_", "ref_"))]
        return {
            **super().describe_run(),
            **{name: getattr(self.settings.stage, name) for name in names},
            "max_new_tokens": self.settings.generation.max_new_tokens,
            **sampling_of(self.settings),
        }


def _check_room(datasets: tuple[Any | None, ...], model: nn.Module, max_new_tokens: int) -> None:
    """Raises a UserError for a prompt after which no reply of `max_new_tokens` fits."""
    budget = prompt_budget(model, max_new_tokens)
    for rows in datasets:
        row, length = max(enumerate(rows.lengths if rows is not None else []), key=lambda pair: pair[1], default=(0, 0))
        if length > budget:
            raise UserError(
                f"the prompt of row {row} ({rows.where(row)}) has {length} tokens; with --max_new_tokens "
                f"{max_new_tokens} at most {budget} fit into the model's context: lower one of --max_new_tokens and "
                "--max_seq_length"
            )
