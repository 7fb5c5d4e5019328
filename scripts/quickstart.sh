#!/usr/bin/env bash
# The whole pipeline on the embedded tiny ChatGLM3, without a GPU and without downloaded weights:
#   CSV → conversations → P-Tuning v2 → a chat → exact answers, base against base + prefix.
#
#   bash scripts/quickstart.sh
#
# Installs what is missing first (scripts/environment.sh: VENV, PYTHON, PIP_ARGS), then takes minutes on 2 CPU cores.
# Everything goes to output/quickstart, which is made anew each time. Knobs, all environment variables:
#   BASE_MODEL_PATH  model folder                      PRE_SEQ_LEN     length of the prefix
#   TEMPLATE         data_processing/templates/*.yaml  LR              learning rate
#   OUTPUT_DIR       where everything goes             MAX_STEP        optimizer steps
#   EVAL_QUESTIONS   questions asked of each file      DEV_BATCH_SIZE  rows of a step
#   SEED                                               INIT_STD        spread of the new prefix
# Further arguments go to finetune.py.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

started=$SECONDS
# shellcheck source=scripts/environment.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/environment.sh"

BASE_MODEL_PATH=${BASE_MODEL_PATH:-THUDM/chatglm3-tiny}
TEMPLATE=${TEMPLATE:-data_processing/templates/pokemon_kanto.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/quickstart}
PRE_SEQ_LEN=${PRE_SEQ_LEN:-64}
# The tiny model wants many small steps, and a larger LR than the 2e-2 that suits models of 6B: the sweep in
# tests/benchmarks/README.md.
LR=${LR:-0.15}
MAX_STEP=${MAX_STEP:-900}
DEV_BATCH_SIZE=${DEV_BATCH_SIZE:-4}
INIT_STD=${INIT_STD:-0.5}
EVAL_QUESTIONS=${EVAL_QUESTIONS:-300}
SEED=${SEED:-42}

titles=()
durations=()

# step TITLE: what follows belongs to this step.
step() {
    end_step
    titles+=("$1")
    step_started=$SECONDS
    printf '\n=== %d. %s\n' "${#titles[@]}" "$1"
}

end_step() {
    if ((${#titles[@]} > ${#durations[@]})); then
        durations+=($((SECONDS - step_started)))
    fi
}

# run COMMAND...: shows the command, then runs it.
run() {
    {
        printf '$'
        printf ' %q' "$@"
        printf '\n'
    } >&2
    "$@" || fail "step ${#titles[@]} (${titles[${#titles[@]} - 1]}) failed; the message is above"
}

cd "$REPOSITORY"
export HF_HUB_OFFLINE=1 # nothing is downloaded from a model hub
step "Environment"
use_environment requirements.txt
echo "$("$python" --version), $python"

if [[ ! -f $BASE_MODEL_PATH/config.json ]]; then
    fail "BASE_MODEL_PATH=$BASE_MODEL_PATH is not a model folder; THUDM/README.md lists what belongs into one"
fi
case $OUTPUT_DIR in
    "" | / | . | .. | "$REPOSITORY" | "$HOME") fail "OUTPUT_DIR=$OUTPUT_DIR is emptied at the start; name a folder of its own" ;;
esac
if [[ -d $OUTPUT_DIR && ! -f $OUTPUT_DIR/.quickstart && $(ls -A "$OUTPUT_DIR") ]]; then
    fail "OUTPUT_DIR=$OUTPUT_DIR holds files that are not the quickstart's, and would be emptied; name another folder"
fi
rm -rf "$OUTPUT_DIR"
mkdir -p "$OUTPUT_DIR"
touch "$OUTPUT_DIR/.quickstart"

step "Data: CSV → conversations → JSON lines"
run "$python" data_processing/data_processing.py --template "$TEMPLATE" --seed "$SEED" \
    --output "$OUTPUT_DIR/pokemon.json" --validation_output "$OUTPUT_DIR/pokemon_validation.json"
run "$python" data_processing/format_tool_poke.py --path "$OUTPUT_DIR/pokemon.json" --output "$OUTPUT_DIR/train.jsonl"
run "$python" data_processing/format_tool_poke.py --path "$OUTPUT_DIR/pokemon_validation.json" \
    --output "$OUTPUT_DIR/validation.jsonl"

step "P-Tuning v2: a prefix of $PRE_SEQ_LEN positions, the model stays as it is"
run "$python" finetune_chatmodel_demo/finetune.py --train_format multi-turn --train_file "$OUTPUT_DIR/train.jsonl" \
    --model_name_or_path "$BASE_MODEL_PATH" --output_dir "$OUTPUT_DIR/prefix" \
    --pre_seq_len "$PRE_SEQ_LEN" --prefix_init_std "$INIT_STD" --max_seq_length 512 \
    --per_device_train_batch_size "$DEV_BATCH_SIZE" --learning_rate "$LR" --lr_scheduler_type cosine \
    --max_steps "$MAX_STEP" --save_steps "$MAX_STEP" --logging_steps 50 --seed "$SEED" "$@"

step "A chat: one conversation, whose questions are piped in"
printf '%s\n' '妙蛙种子是什么属性？' '它的弱点是什么？' '请告诉我它的身高。' | tee "$OUTPUT_DIR/questions.txt"
run "$python" finetune_chatmodel_demo/inference.py --pt-checkpoint "$OUTPUT_DIR/prefix" \
    <"$OUTPUT_DIR/questions.txt" | tee "$OUTPUT_DIR/replies.txt"

step "Exact answers: base against base + prefix"
run "$python" finetune_chatmodel_demo/evaluate.py --pt-checkpoint "$OUTPUT_DIR/prefix" \
    --data "trained phrasings=$OUTPUT_DIR/train.jsonl" --data "unseen phrasings=$OUTPUT_DIR/validation.jsonl" \
    --max-questions "$EVAL_QUESTIONS" --max-new-tokens 40 --seed "$SEED" --output "$OUTPUT_DIR/scores.json"
end_step

printf '\n=== Seconds\n'
for i in "${!titles[@]}"; do
    printf '%6d  %s\n' "${durations[$i]}" "${titles[$i]}"
done
printf '%6d  after the installation\n' $((SECONDS - started - durations[0]))
echo
echo "Talk with it yourself: $python finetune_chatmodel_demo/inference.py --pt-checkpoint $OUTPUT_DIR/prefix"
