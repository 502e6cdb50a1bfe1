"""A profile's operations by part of the model."""

from oq2vl_jax.bench.breakdown import part_of, scopes_of

PROGRAM = """\
%body.1 (p: f32[8]) -> f32[8] {
  %constant.2 = f32[] constant(0), metadata={op_name="jit(step)/while/body"}
  %exp.3 = f32[8]{0} exponential(%p), metadata={op_name="jit(step)/jvp(attention)/while/body/exp"}
  %max.4 = f32[8]{0} maximum(%exp.3, %p), metadata={op_name="jit(step)/jvp(attention)/while/body/max"}
  ROOT %dot.5 = f32[8]{0} dot(%exp.3, %max.4), lhs_contracting_dims={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %fusion.6 = f32[8]{0} fusion(%p), metadata={op_name="jit(step)/optimizer/add"}
  %dot.7 = f32[8]{0} dot(%p, %fusion.6)
  %copy.8 = f32[8]{0} copy(%p)
  ROOT %add.9 = f32[8]{0} add(%dot.7, %copy.8), metadata={op_name="jit(step)/add"}
  %mul.10 = f32[8]{0} multiply(%dot.7, %copy.8), metadata={op_name="jit(step)/mul"}
}
"""


def test_an_operation_without_scopes_belongs_where_most_of_its_computation_does():
    scopes = scopes_of(PROGRAM)
    parts = {operation: part_of(operation, scope) for operation, scope in scopes.items()}
    assert {name: parts[name] for name in ("exp.3", "dot.5", "fusion.6", "dot.7", "copy.8", "add.9")} == {
        "exp.3": "attention", "dot.5": "attention",  # dot.5 was rewritten by the compiler: no scopes of its own
        "fusion.6": "optimizer", "dot.7": "matmul", "copy.8": "other", "add.9": "other",
    }  # fmt: skip
