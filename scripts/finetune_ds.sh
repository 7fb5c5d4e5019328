#!/usr/bin/env bash
# All parameters on prompts and responses, with DeepSpeed (default: the AdvertiseGen data set).
# Every knob is an environment variable; further arguments go to finetune.py and override the knobs:
#   LR=5e-5 OUTPUT_DIR=output/mine scripts/finetune_ds.sh --seed 1
# OUTPUT_DIR of a run that was interrupted continues it.
# DEEPSPEED_CONFIG: ds_zero2 (default), ds_zero2_offload, ds_zero3, ds_zero3_offload, or a file of yours.
# Several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and one shared OUTPUT_DIR.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

LR=${LR:-1e-4}
NUM_GPUS=${NUM_GPUS:-4}
MAX_SOURCE_LEN=${MAX_SOURCE_LEN:-1024}
MAX_TARGET_LEN=${MAX_TARGET_LEN:-128}
DEV_BATCH_SIZE=${DEV_BATCH_SIZE:-4}
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-1}
MAX_STEP=${MAX_STEP:-500}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
RUN_NAME=${RUN_NAME:-advertise_gen_ft}
BASE_MODEL_PATH=${BASE_MODEL_PATH:-THUDM/chatglm3-6b}
DATASET_PATH=${DATASET_PATH:-formatted_data/advertise_gen.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/$RUN_NAME-$(date +%Y%m%d-%H%M%S)-$LR}

# DeepSpeed wants its processes started by torchrun, even a single one.
NEEDS_TORCHRUN=yes
DEEPSPEED_CONFIG=$(find_deepspeed_config "${DEEPSPEED_CONFIG:-ds_zero2}")

run_finetuning --train_format input-output --max_source_length "$MAX_SOURCE_LEN" --max_target_length "$MAX_TARGET_LEN" \
    --deepspeed "$DEEPSPEED_CONFIG" -- "$@"
