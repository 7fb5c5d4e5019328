#!/usr/bin/env bash
# P-Tuning v2 on the Pokémon conversations (made by data_processing.py and format_tool_poke.py).
# The LR is upstream's for P-Tuning v2. With the 2e-5 of a published Pokémon run the prefix learned nothing.
# Every knob is an environment variable; further arguments go to finetune.py and override the knobs:
#   LR=1e-2 OUTPUT_DIR=output/mine scripts/finetune_ps_pt_m.sh --seed 1
# OUTPUT_DIR of a run that was interrupted continues it.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
LR=${LR:-2e-2}
NUM_GPUS=${NUM_GPUS:-1}
MAX_SEQ_LEN=${MAX_SEQ_LEN:-2048}
DEV_BATCH_SIZE=${DEV_BATCH_SIZE:-1}
GRAD_ACCUMULATION_STEPS=${GRAD_ACCUMULATION_STEPS:-16}
MAX_STEP=${MAX_STEP:-1000}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
RUN_NAME=${RUN_NAME:-pokemon}
BASE_MODEL_PATH=${BASE_MODEL_PATH:-THUDM/chatglm3-6b}
DATASET_PATH=${DATASET_PATH:-formatted_data/pokemon_conversations.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/$RUN_NAME}

run_finetuning --train_format multi-turn --max_seq_length "$MAX_SEQ_LEN" --pre_seq_len "$PRE_SEQ_LEN" -- "$@"
