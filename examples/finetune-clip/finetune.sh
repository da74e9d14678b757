#!/usr/bin/env bash
# From weights that exist to a zero-shot classifier of your own classes:
#
#     ./finetune.sh PHOTOS OUT [OPTION ...]
#
# PHOTOS has the folders train/ and held-out/, and each of them a folder of photographs for each
# class. Options go to unicl-pretrain, by default --preset photos-small.
set -euo pipefail
usage="usage: finetune.sh PHOTOS OUT [OPTION of unicl-pretrain ...]"
photos=${1:?$usage} out=${2:?$usage}
shift 2
[ $# -gt 0 ] || set -- --preset photos-small

for part in train held-out; do
    unicl-pack build "$photos/$part" --out "$out/packed/$part"
done
unicl-pretrain --data.train "$out/packed/train" --data.evaluate "$out/packed/held-out" \
    --out "$out/run" "$@"
unicl-eval zero-shot --checkpoint "$out/run" --data "$out/packed/held-out" --json "$out/zero-shot.json"

# any images, any words: here those that were held out, and the names of their folders
classes=()
for folder in "$photos"/train/*/; do
    name=$(basename "$folder")
    classes+=("${name//_/ }")
done
unicl-eval classify --checkpoint "$out/run" --data "$photos/held-out" --classes "${classes[@]}" \
    --out "$out/answers.jsonl"
echo "Try images against any words: unicl-eval serve --checkpoint $out/run"
