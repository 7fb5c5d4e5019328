"""PPO: the policy answers prompts, a reward scores the answers, and clipped updates make better ones likelier.

    python finetune_chatmodel_demo/finetune.py --stage ppo --finetuning_type lora --reward_model output/rm \\
        --train_file formatted_data/pokemon_conversations.jsonl --model_name_or_path THUDM/chatglm3-6b \\
        --adapter_name_or_path output/sft --output_dir output/ppo --max_new_tokens 128

The formulas are in `ppo_math`, the networks in `ppo_policy`, what a rollout is in `ppo_rollouts`, the meaning of the
flags in `ppo_settings`. Exercise it with `pytest tests/test_ppo.py`.
"""

import time
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
from finetune_chatmodel_demo.training.stages import ppo_settings
from finetune_chatmodel_demo.training.stages.ppo_collecting import Collector
from finetune_chatmodel_demo.training.stages.ppo_figures import Figures
from finetune_chatmodel_demo.training.stages.ppo_policy import PolicyWithValue, Reference, without_adapter_wrapper
from finetune_chatmodel_demo.training.stages.ppo_rewards import build_reward
from finetune_chatmodel_demo.training.stages.ppo_rollouts import Rollout, order_of_prompts, seed_of
from finetune_chatmodel_demo.training.stages.ppo_updating import Updater
from finetune_chatmodel_demo.training.stages.ppo_watch import RolloutWatch
from finetune_chatmodel_demo.training.stages.reference import build_reference, disable_dropout
from finetune_chatmodel_demo.training.trainer import RunTrainer

STATE_FILE = "ppo_state.pt"
ROLLOUT_FILE = "ppo_rollout_{process}.pt"


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
        for rows in (train_rows, validation_rows):
            _check_room(rows, model, settings.generation.max_new_tokens)
        disable_dropout(self.model)
        self.policy = PolicyWithValue(self.model, ppo_settings.sampling_of(settings)["temperature"])
        self.collector = Collector(
            self.policy,
            build_reference(self.model, settings, Reference),
            build_reward(settings, tokenizer),
            settings,
            tokenizer,
            self.accelerator,
            self._describe_failure,
        )
        self.updater: Updater | None = None
        self.figures, self.rollout_watch = Figures(), RolloutWatch(settings)
        self.rollout: Rollout | None = None
        self.rollouts_done = self.updates_done = 0  # whole rollouts, and updates of the one at work

    # The run

    def count_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return ppo_settings.count_updates(self.settings, len(self.train_dataset))

    def describe_steps(self, steps: int) -> dict[str, str]:
        """Lines of the table before the start: title → text."""
        stage, prompts = self.settings.stage, len(self.train_dataset)
        replies = ppo_settings.replies_of_rollout(self.settings) * self.args.world_size
        updates = ppo_settings.updates_of_rollout(self.settings)
        sampling = ", ".join(f"{name} {value:g}" for name, value in ppo_settings.sampling_of(self.settings).items())
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
        replies = steps * ppo_settings.replies_of_update(self.args) * self.args.world_size
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
        self.updater = Updater(self.policy, self.settings, self.accelerator, self._describe_failure)
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
            decaying = set(self.get_decay_parameter_names(self.model))
            named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
            groups = [
                {
                    "params": [value for name, value in named if (name in decaying) == decays],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ]
            head = {"params": list(self.policy.value_head.parameters()), "weight_decay": 0.0}
            head["lr"] = self.settings.stage.ppo_value_lr
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]] + [head], **options)
        return self.optimizer

    # A step

    def _collect(self) -> Rollout:
        """The next rollout of this process."""
        seed, process, processes = self.args.seed, self.args.process_index, self.args.world_size
        # Every generator starts anew, also those that a reward function may use: a resumed run draws the same.
        set_seed(seed_of(seed, self.rollouts_done, process))
        size = ppo_settings.replies_of_rollout(self.settings) * processes
        data_seed = seed if self.args.data_seed is None else self.args.data_seed
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
        figures = self.updater.compute_gradients(replies)
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
        size = ppo_settings.replies_of_update(self.args)
        epoch, place = divmod(self.updates_done, self.settings.stage.ppo_buffer_size)
        seed = seed_of(self.args.seed, self.rollouts_done, self.args.process_index, epoch)
        order = torch.randperm(len(self.rollout.scores), generator=torch.Generator().manual_seed(seed))
        return self.rollout.select(order[place * size : (place + 1) * size].to(self.args.device))

    def _advance(self) -> None:
        """Counts an update; after the last one of a rollout the next begins."""
        self.updates_done += 1
        whole = ppo_settings.updates_of_rollout(self.settings)
        if self.updates_done == whole:
            self.rollout, self.updates_done = None, 0
            self.rollouts_done += 1
        size = ppo_settings.replies_of_rollout(self.settings) * self.args.world_size
        self.state.epoch = (self.rollouts_done + self.updates_done / whole) * size / len(self.train_dataset)

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
                "figures": self.figures.state(),
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
        self.figures.load(state["figures"])
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
        sampling = ppo_settings.sampling_of(self.settings)
        return {
            **super().describe_run(),
            **{name: getattr(self.settings.stage, name) for name in names},
            "max_new_tokens": self.settings.generation.max_new_tokens,
            **sampling,
        }


def _check_room(rows: Any | None, model: nn.Module, max_new_tokens: int) -> None:
    """Raises a UserError for a prompt after which no reply of `max_new_tokens` fits."""
    try:
        budget = prompt_budget(model, max_new_tokens)
    except ValueError as error:
        raise UserError(f"--max_new_tokens: {error}") from error
    for i in range(0 if rows is None else len(rows)):
        length = len(rows[i]["input_ids"])
        if length > budget:
            raise UserError(
                f"the prompt of row {i} ({rows.where(i)}) has {length} tokens; with --max_new_tokens {max_new_tokens} "
                f"at most {budget} fit into the model's context: lower one of --max_new_tokens and --max_seq_length"
            )
