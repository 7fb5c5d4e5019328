# Shared by the finetune_*.sh scripts, which set the knobs and call run_finetuning. Not to be run by itself.

set -euo pipefail

REPOSITORY=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Where no environment is active, the one that quickstart.sh made is used, if it did.
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-}${PYTHON:-} && -x $REPOSITORY/.venv/bin/python ]]; then
    PATH=$REPOSITORY/.venv/bin:$PATH
fi

# The original's scripts spell this knob GRAD_ACCUMULARION_STEPS; both spellings count.
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-${GRAD_ACCUMULARION_STEPS:-}}

GIVEN_OUTPUT_DIR=${OUTPUT_DIR:-}

# fail MESSAGE: for knobs that cannot work.
fail() {
    printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

# check_knobs: numbers that are none, and knobs in lower case, which nothing would read.
check_knobs() {
    local name lower
    # MAX_STEP=-1 leaves the length to --num_train_epochs; SAVE_INTERVAL may be a share, and finetune.py looks at it.
    for name in NUM_GPUS NNODES NODE_RANK DEV_BATCH_SIZE GRAD_ACCUMULATION_STEPS PRE_SEQ_LEN MAX_SEQ_LEN \
        MAX_SOURCE_LEN MAX_TARGET_LEN; do
        [[ ! ${!name:-} || ${!name} =~ ^[0-9]+$ ]] || fail "$name=${!name} is not a whole number; give one, or leave it out"
        [[ ! ${!name:-} ]] || printf -v "$name" '%d' "$((10#${!name}))" # 08 would be read as an octal number
    done
    [[ $MAX_STEP =~ ^(-1|[0-9]+)$ ]] || fail "MAX_STEP=$MAX_STEP is not a whole number; give one, or leave it out"
    ((NUM_GPUS > 0)) || fail "NUM_GPUS=$NUM_GPUS: it is the number of processes, 1 or more"
    for name in PRE_SEQ_LEN LR NUM_GPUS MAX_SEQ_LEN MAX_SOURCE_LEN MAX_TARGET_LEN DEV_BATCH_SIZE \
        GRAD_ACCUMULATION_STEPS MAX_STEP SAVE_INTERVAL RUN_NAME DATASET_PATH VALIDATION_PATH BASE_MODEL_PATH \
        OUTPUT_DIR DEEPSPEED_CONFIG; do
        lower=$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]')
        [[ ! ${!lower:-} ]] || fail "$lower=${!lower} has no effect: knobs are written in capitals, $name=${!lower} (else: unset $lower)"
    done
}

# with_slashes PATH: one that was written with backslashes, where no file has that name.
with_slashes() {
    if [[ -e $1 ]]; then printf '%s\n' "$1"; else printf '%s\n' "${1//\\//}"; fi
}

# resolve PATH: relative paths of inputs start at the repository, or at the current folder where only that has the file.
resolve() {
    local path
    path=$(with_slashes "$1")
    case $path in
        /*) printf '%s\n' "$path" ;;
        *) if [[ ! -e $REPOSITORY/$path && -e $path ]]; then
            printf '%s\n' "$PWD/$path"
        else
            printf '%s\n' "$REPOSITORY/$path"
        fi ;;
    esac
}

# find_deepspeed_config NAME: a name in finetune_chatmodel_demo/configs (ds_zero3), or a path of a file.
find_deepspeed_config() {
    local folder=$REPOSITORY/finetune_chatmodel_demo/configs
    if [[ $1 != */* && $1 != *.json ]]; then
        [[ ! -d $folder || -e $folder/$1.json ]] || fail "DEEPSPEED_CONFIG=$1: there is no $folder/$1.json, only $(
            cd "$folder" && echo ds_*.json
        ); give one of these names, or a path"
        printf '%s\n' "$folder/$1.json"
    else
        resolve "$1"
    fi
}

# choose_launcher: fills the array `launcher`. One node: NUM_GPUS processes. Several: the same script on each of them
# with the same knobs, but for NODE_RANK.
choose_launcher() {
    local nodes=${NNODES:-1} rank=${NODE_RANK:-}
    if ((nodes > 1)); then
        [[ ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs MASTER_ADDR, the address of the node with NODE_RANK=0"
        [[ $rank ]] || fail "NNODES=$nodes needs NODE_RANK, 0 to $((nodes - 1)), another one on each node"
        ((rank < nodes)) || fail "NODE_RANK=$rank: with NNODES=$nodes it is 0 to $((nodes - 1))"
        [[ $GIVEN_OUTPUT_DIR ]] || fail "NNODES=$nodes needs OUTPUT_DIR, one folder that all nodes see"
        launcher=(torchrun --nnodes="$nodes" --node_rank="$rank" --master_addr="$MASTER_ADDR"
            --master_port="${MASTER_PORT:-29500}" --nproc_per_node="$NUM_GPUS")
    elif ((NUM_GPUS > 1)) || [[ ${NEEDS_TORCHRUN:-} ]]; then
        if [[ ${MASTER_PORT:-} ]]; then
            launcher=(torchrun --nnodes=1 --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$MASTER_PORT")
        else
            launcher=(torchrun --standalone --nnodes=1) # finds a free port
        fi
        launcher+=(--nproc_per_node="$NUM_GPUS")
    else
        launcher=("${PYTHON:-python}")
    fi
}

# say_how_to_continue STATUS FOLDER: after a run that ended early and left a checkpoint.
say_how_to_continue() {
    local newest
    newest=$(cd "$2" && ls -d checkpoint-* 2>/dev/null | sort -t- -k2n | tail -n 1 || true)
    if [[ $newest ]]; then
        printf '%s: the run ended early (status %s; the first error above is the reason). The same command with ' \
            "$(basename "$0")" "$1"
        printf 'OUTPUT_DIR=%q continues from %s.\n' "$2" "$newest"
    fi
}

# run_finetuning METHOD_FLAGS... -- EXTRA_ARGUMENTS...: everything that is printed also goes to OUTPUT_DIR/train.log
# (node 1 of several: train-node1.log).
# Extra arguments come last, so that they override the knobs.
run_finetuning() {
    local -a method_flags=() launcher command
    while [[ $1 != -- ]]; do
        method_flags+=("$1")
        shift
    done
    shift
    check_knobs
    # A relative folder that was named lies in the current folder, the default in the repository.
    local output_dir
    output_dir=$(with_slashes "$OUTPUT_DIR")
    if [[ $output_dir != /* ]]; then
        if [[ $GIVEN_OUTPUT_DIR ]]; then output_dir=$PWD/$output_dir; else output_dir=$REPOSITORY/$output_dir; fi
    fi

    choose_launcher

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
    local log=train.log status=0
    ((${NNODES:-1} == 1 || NODE_RANK == 0)) || log=train-node$NODE_RANK.log
    export PYTHONUNBUFFERED=1
    {
        printf '%q ' "${command[@]}" "$@"
        printf '\n'
        "${command[@]}" "$@" || status=$?
        ((status == 0)) || say_how_to_continue "$status" "$output_dir"
        exit "$status"
    } 2>&1 | tee -i -a "$output_dir/$log" # -i: Ctrl-C ends the run, whose last words still arrive
}
