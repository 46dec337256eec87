"""Benchmarks of text-to-image networks: their answers and published formulas, one file each.

`BENCHMARKS` is the table of them. `evaluation.benchmark_scoring` fills in the answers of a run, and
`evaluation.comparison` compares methods by the measures.
"""

from flax_pref.evaluation.benchmarks.benchmark import Benchmark
from flax_pref.evaluation.benchmarks.dpg import DPG
from flax_pref.evaluation.benchmarks.geneval import GENEVAL
from flax_pref.evaluation.benchmarks.geneval2 import GENEVAL2
from flax_pref.evaluation.benchmarks.t2i_compbench import T2I_COMPBENCH

BENCHMARKS: dict[str, Benchmark] = {one.name: one for one in (GENEVAL, GENEVAL2, DPG, T2I_COMPBENCH)}
