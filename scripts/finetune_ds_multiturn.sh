#!/usr/bin/env bash
# All parameters on multi-turn conversations, with DeepSpeed (default: the ToolAlpaca data set).
# Every knob is an environment variable; further arguments go to finetune.py and override the knobs:
#   LR=5e-5 OUTPUT_DIR=output/mine scripts/finetune_ds_multiturn.sh --seed 1
# OUTPUT_DIR of a run that was interrupted continues it.
# DEEPSPEED_CONFIG: ds_zero2 (default), ds_zero2_offload, ds_zero3, ds_zero3_offload, or a file of yours.
# Several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and one shared OUTPUT_DIR.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

LR=${LR:-1e-4}
NUM_GPUS=${NUM_GPUS:-4}
MAX_SEQ_LEN=${MAX_SEQ_LEN:-2048}
DEV_BATCH_SIZE=${DEV_BATCH_SIZE:-16}
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-1}
MAX_STEP=${MAX_STEP:-200}
SAVE_INTERVAL=${SAVE_INTERVAL:-50}
RUN_NAME=${RUN_NAME:-tool_alpaca_ft}
BASE_MODEL_PATH=${BASE_MODEL_PATH:-THUDM/chatglm3-6b}
DATASET_PATH=${DATASET_PATH:-formatted_data/tool_alpaca.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/$RUN_NAME-$(date +%Y%m%d-%H%M%S)-$LR}

# DeepSpeed wants its processes started by torchrun, even a single one.
NEEDS_TORCHRUN=yes
DEEPSPEED_CONFIG=$(find_deepspeed_config "${DEEPSPEED_CONFIG:-ds_zero2}")

run_finetuning --train_format multi-turn --max_seq_length "$MAX_SEQ_LEN" \
    --deepspeed "$DEEPSPEED_CONFIG" -- "$@"
