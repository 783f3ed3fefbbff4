#!/usr/bin/env bash
# Every table and figure of README, results/reference and its notebooks, on the two models that run on a laptop.
#
#   DATA=FOLDER scripts/reproduce.sh          FOLDER: README, "Data without the hub"; without it, what needs data is left out
#   QWEN=FILE scripts/reproduce.sh            FILE: Qwen2.5-Coder-0.5B-Instruct as GGUF (Q4_K_M); without it, its run is left out
#   LIMIT=20 scripts/reproduce.sh             fewer samples
#   BATCH=100 scripts/reproduce.sh            on a GPU: as many prompts at a time where our own policy recalls lines
#
# Up to eight hours on two CPU cores. An interrupted run goes on, a finished one is not computed again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${LIMIT:-100}
RUNS=(recall-linerecall)  # kept with its flipped samples
# kept as summaries: all is to stay below 2.5 MB
SMALL=(recall-table{1,2,3} recall-ablations recall-pareto-{linerecall,guardedrecall,fidelity} 135m-{fidelity,steps})
FRONT=(135m-front{,-code})
IMPORTANCE=(135m-importance{,-code} importance-{linerecall,guardedrecall,key_value})
FIELD=(field-linerecall-{visible,hidden} field-fidelity)
RISKS=(recall-risk)

recall=(model=smollm2-recall task.limit="$LIMIT")
short=(task.max_new_tokens=24)  # an answer has 7 tokens; a broken cache would go on

"$PYTHON" run.py panel=demo task=linerecall "${recall[@]}" "${short[@]}" name=recall-linerecall
for table in table1 table2 table3 ablations; do
  "$PYTHON" -m "experiments.$table" "${recall[@]}" "${short[@]}" name="recall-$table"
done
half=(task.limit=$(((LIMIT + 1) / 2)))  # twenty-three policies
"$PYTHON" -m experiments.pareto model=smollm2-recall name=recall-pareto \
  "tasks=linerecall ${half[*]} ${short[*]},guardedrecall ${half[*]} ${short[*]},fidelity task.limit=6"
"$PYTHON" run.py panel=risk task=guardedrecall "${recall[@]}" name=recall-risk
"$PYTHON" run.py panel=paper model=smollm2-135m task=fidelity name=135m-fidelity
for panel in front importance; do
  "$PYTHON" run.py panel=$panel model=smollm2-135m task=fidelity batch_size=2 name=135m-$panel
  "$PYTHON" run.py panel=$panel model=smollm2-135m task=fidelity task.text=code batch_size=2 name=135m-$panel-code
done
long=(model=smollm2-recall task.limit=$((2 * LIMIT)) batch_size="${BATCH:-4}" fidelity=false)
"$PYTHON" run.py panel=front task=linerecall "${long[@]}" name=recall-front
"$PYTHON" run.py panel=front task=linerecall task.lines=40 "${long[@]}" name=recall-front-40
for task in linerecall guardedrecall; do
  "$PYTHON" run.py panel=importance task=$task "${long[@]}" "name=importance-$task"
done
"$PYTHON" run.py panel=importance task=key_value task.keys=4 model=smollm2-recall task.limit="$LIMIT" batch_size=10 fidelity=false \
  name=importance-key_value
brief=(task.max_new_tokens=16 fidelity=false)
"$PYTHON" run.py panel=field model=smollm2-recall task=linerecall task.limit=30 batch_size=6 "${brief[@]}" name=field-linerecall-visible
"$PYTHON" run.py panel=field model=smollm2-recall task=linerecall task.limit=24 batch_size=2 "${brief[@]}" protocol.question=hidden \
  name=field-linerecall-hidden
"$PYTHON" run.py panel=field model=smollm2-135m task=fidelity task.limit=4 batch_size=2 name=field-fidelity
"$PYTHON" -m experiments.steps model=smollm2-135m task.limit=6 batch_size=2 name=135m-steps
if [ -n "${QWEN:-}" ]; then
  qwen=(model=qwen2.5-7b model.name=qwen2.5-coder-0.5b model.path="$QWEN")
  "$PYTHON" run.py panel=front "${qwen[@]}" task=fidelity batch_size=2 name=qwen-front
  "$PYTHON" run.py panel=front "${qwen[@]}" task=fidelity task.text=code batch_size=2 name=qwen-front-code
  "$PYTHON" run.py panel=importance "${qwen[@]}" task=fidelity batch_size=2 name=qwen-importance
  "$PYTHON" -m experiments.steps "${qwen[@]}" task.limit=3 batch_size=3 name=qwen-steps
  SMALL+=(qwen-steps)
  FRONT+=(qwen-front{,-code})
  IMPORTANCE+=(qwen-importance)
fi
if [ -n "${DATA:-}" ]; then
  # short answers and no second decode for fidelity: fifteen policies on two cores
  few=(panel=risk task.data_dir="$DATA" task.limit=20 fidelity=false)
  parts=(task.parts.{extraction,hijacking,helpful,advbench,harmbench,jailbreakbench,xstest})
  "$PYTHON" run.py model=smollm2-135m task=safety "${few[@]}" batch_size=10 "${parts[@]/%/.max_new_tokens=48}" \
    task.parts.sys_ifeval.max_new_tokens=128 task.parts.guardedrecall.max_new_tokens=24 name=135m-safety
  parts=(task.parts.{linerecall,guardedrecall,xquad,nq_open})
  "$PYTHON" run.py model=smollm2-135m task=hallucination "${few[@]}" batch_size=10 "${parts[@]/%/.max_new_tokens=32}" \
    name=135m-hallucination
  parts=(task.parts.lines_{10,20,40,80})
  "$PYTHON" run.py model=smollm2-recall task=contextloss "${few[@]}" batch_size=2 "${parts[@]/%/.max_new_tokens=16}" \
    task.parts.{key_value,niah_multikey}.{limit=4,max_new_tokens=40} name=recall-contextloss
  RISKS+=(135m-safety 135m-hallucination recall-contextloss)
fi
"$PYTHON" -m experiments.risks "${RISKS[@]/#/results/runs/}"
"$PYTHON" scripts/keep_results.py "${RUNS[@]/#/results/runs/}"
FRONT+=(recall-front{,-40})
"$PYTHON" -m experiments.front "${FRONT[@]/#/results/runs/}"
"$PYTHON" -m experiments.importance "${IMPORTANCE[@]/#/results/runs/}"
"$PYTHON" -m experiments.field "${FIELD[@]/#/results/runs/}"
SMALL+=("${FRONT[@]}" "${IMPORTANCE[@]}" "${FIELD[@]}" "${RISKS[@]}")
"$PYTHON" scripts/keep_results.py --summaries "${SMALL[@]/#/results/runs/}"

cp results/runs/recall-linerecall/curve.png results/figures/demo.png
cp results/runs/135m-fidelity/curve.png results/figures/fidelity.png
if [ -n "${DATA:-}" ]; then
  cp results/runs/recall-contextloss/depth.png results/figures/depth-smollm2-recall.png
fi
"$PYTHON" - <<'END'  # not jupyter execute, which writes the time of day into each cell
import nbformat
from nbclient import NotebookClient

for name in ("curves", "risks"):
    notebook = nbformat.read(f"results/{name}.ipynb", as_version=4)
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": "results"}}).execute()
    nbformat.write(notebook, f"results/{name}.ipynb")
END
"$PYTHON" -m mikv.records check results/reference
