"""The benchmarks by name."""

from oq2vl_jax.eval.benchmarks import ai2d, easy_vqa, mathvista, mmbench, mmmu, mmstar, pope, seedbench, textvqa

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (mmbench, seedbench, mmstar, mathvista, ai2d, textvqa, pope, mmmu, easy_vqa)
}
