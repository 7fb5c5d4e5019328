# Shared by the finetune_*.sh scripts, which set the knobs and call run_finetuning. Not to be run by itself.

set -euo pipefail

REPOSITORY=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Where no environment is active, the one that quickstart.sh made is used, if it did.
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-}${PYTHON:-} && -x $REPOSITORY/.venv/bin/python ]]; then
    PATH=$REPOSITORY/.venv/bin:$PATH
fi

# The original's scripts spell this knob GRAD_ACCUMULARION_STEPS; both spellings count.
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-${GRAD_ACCUMULARION_STEPS:-}}

# resolve PATH: relative paths of inputs start at the repository, or at the current folder where only that has the file.
resolve() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) if [[ ! -e $REPOSITORY/$1 && -e $1 ]]; then
            printf '%s\n' "$PWD/$1"
        else
            printf '%s\n' "$REPOSITORY/$1"
        fi ;;
    esac
}

# run_finetuning METHOD_FLAGS... -- EXTRA_ARGUMENTS...: everything that is printed also goes to OUTPUT_DIR/train.log.
# Extra arguments come last, so that they override the knobs.
run_finetuning() {
    local -a method_flags=() launcher command
    while [[ $1 != -- ]]; do
        method_flags+=("$1")
        shift
    done
    shift
    local output_dir=$OUTPUT_DIR
    [[ $output_dir == /* ]] || output_dir=$REPOSITORY/$output_dir

    if ((NUM_GPUS > 1)) || [[ ${NEEDS_TORCHRUN:-} ]]; then
        if [[ ${MASTER_PORT:-} ]]; then
            launcher=(torchrun --nnodes=1 --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$MASTER_PORT")
        else
            launcher=(torchrun --standalone --nnodes=1) # finds a free port
        fi
        launcher+=(--nproc_per_node="$NUM_GPUS")
    else
        launcher=("${PYTHON:-python}")
    fi

    command=("${launcher[@]}" "$REPOSITORY/finetune_chatmodel_demo/finetune.py"
        --train_file "$(resolve "$DATASET_PATH")"
        --preprocessing_num_workers "${PREPROCESSING_NUM_WORKERS:-1}"
        --model_name_or_path "$(resolve "$BASE_MODEL_PATH")"
        --output_dir "$output_dir"
        --per_device_train_batch_size "$DEV_BATCH_SIZE"
        --gradient_accumulation_steps "$GRAD_ACCUMULATION_STEPS"
        --max_steps "$MAX_STEP"
        --logging_steps 1
        --save_steps "$SAVE_INTERVAL"
        --learning_rate "$LR"
        --resume_from_checkpoint "${AUTORESUME_FROM_CHECKPOINT:-True}"
        "${method_flags[@]}")
    if [[ ${VALIDATION_PATH:-} ]]; then
        command+=(--validation_file "$(resolve "$VALIDATION_PATH")")
    fi

    mkdir -p "$output_dir"
    export PYTHONUNBUFFERED=1
    {
        printf '%q ' "${command[@]}" "$@"
        printf '\n'
        "${command[@]}" "$@"
    } 2>&1 | tee -a "$output_dir/train.log"
}
