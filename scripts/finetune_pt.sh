#!/usr/bin/env bash
# P-Tuning v2 on prompts and responses (default: the AdvertiseGen data set).
# Every knob is an environment variable; further arguments go to finetune.py and override the knobs:
#   LR=1e-2 OUTPUT_DIR=output/mine scripts/finetune_pt.sh --seed 1
# OUTPUT_DIR of a run that was interrupted continues it.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
LR=${LR:-2e-2}
NUM_GPUS=${NUM_GPUS:-1}
MAX_SOURCE_LEN=${MAX_SOURCE_LEN:-1024}
MAX_TARGET_LEN=${MAX_TARGET_LEN:-128}
DEV_BATCH_SIZE=${DEV_BATCH_SIZE:-1}
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-32}
MAX_STEP=${MAX_STEP:-1000}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
RUN_NAME=${RUN_NAME:-advertise_gen_pt}
BASE_MODEL_PATH=${BASE_MODEL_PATH:-THUDM/chatglm3-6b}
DATASET_PATH=${DATASET_PATH:-formatted_data/advertise_gen.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/$RUN_NAME-$(date +%Y%m%d-%H%M%S)-$PRE_SEQ_LEN-$LR}

run_finetuning --train_format input-output --max_source_length "$MAX_SOURCE_LEN" --max_target_length "$MAX_TARGET_LEN" \
    --pre_seq_len "$PRE_SEQ_LEN" -- "$@"
