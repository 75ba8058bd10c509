#!/usr/bin/env bash
# Makes the models that ship as "small", from sound that anyone may have: train_small.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && cd "$1"
export OMP_NUM_THREADS=1 LC_ALL=C

aar data fetch flite freedoom sounds
aar data synthesize sounds
# Not learned from: the effects that the demo shows, and every 25th other recording.
(
  cd sounds
  find speech effects music textures -name '*.wav' -o -name '*.flac' | sort > all.txt
  grep -iE 'ds(doropn|dorcls|firsht|firxpl|brssit|pstart|pstop|sawup|sawidl|sawful|telept|swtchn|plasma)\.' all.txt > shown.txt
  grep -vxFf shown.txt all.txt | awk 'NR % 25 == 0' | cat shown.txt - | sort > held_out.txt
  grep -vxFf held_out.txt all.txt > train.txt
)

half() {  # What ships is in float16; the transformer learns the tokens of that.
  python - "$1" "$2" "$3" <<'END'
import sys

import aar
import torch

kind, source, target = sys.argv[1:]
getattr(aar, kind).from_pretrained(source).save_pretrained(target, torch.float16)
END
}

aar train-sat "$here/small-sat.yaml" data.source=sounds/train.txt data.held_out=sounds/held_out.txt --out sat-run --resume
half SAT sat-run/model small/sat
aar tokenize sounds/train.txt tokens --model small/sat --overlap 0.5
aar tokenize sounds/held_out.txt held-out-tokens --model small/sat
aar train-aar "$here/small-aar.yaml" tokens=tokens data.held_out=held-out-tokens --out aar-run --resume
half AAR aar-run/model small/aar
aar evaluate sounds/held_out.txt --model small/sat --aar small/aar --json metrics.json
