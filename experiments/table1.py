"""Table 1 of MiKV: what eviction would drop is dropped, or kept at 4, 3 or 2 bits; shares of 20, 25 and 50 % at 16 bits.

python -m experiments.table1 model=smollm2-recall

The paper's numbers are known from secondary sources only: 50 % evicted 43, 50 % with INT3 99.8 (a blog), 20 % evicted 4.0 and
20 % with INT4 100 (a re-implementation that quotes the table). Whether it has the balancer is unknown; here it has not.
"""

from experiments.base import main

PAPER = {
    "h2o 50%": 43.0,
    "mikv 50% 16/3 no balancer": 99.8,
    "h2o 20%": 4.0,
    "mikv 20% 16/4 no balancer": 100.0,
}

if __name__ == "__main__":
    main("table1", "Table 1: retained at few bits, or evicted", PAPER)
