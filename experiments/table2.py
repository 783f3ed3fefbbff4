"""Table 2 of MiKV: with and without outlier awareness, 20 % at 16 bits, the rest at 3 or 2.

python -m experiments.table2 model=smollm2-recall

The paper's numbers, as a re-implementation quotes them: INT2 without the balancer 64.0, with it 92.6. Uniform quantization with
and without the same balancer stands beside them: it is a rival of fewer bytes.
"""

from experiments.base import main

PAPER = {"mikv 20% 16/2 no balancer": 64.0, "mikv 20% 16/2": 92.6}

if __name__ == "__main__":
    main("table2", "Table 2: with and without outlier awareness", PAPER)
