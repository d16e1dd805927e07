"""Which files of the package `mutate.py` puts faults into, and which tests must notice."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """Files of the package, and the tests that alone must notice a fault in them."""

    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]


# The first test that fails ends a run. What takes long and kills nothing more is left out.
PARTS = [
    Part("call", ("call.py",), ("tests/test_call.py",)),
    Part("policy", ("policy.py",), ("tests/test_policy.py", "tests/test_attention.py")),
    Part("plan", ("plan/*.py",), ("tests/plan",)),
    Part(
        "scores",
        ("scores.py",),
        ("tests/test_scores.py", "tests/test_scores_of_blocks.py", "tests/test_gate_scores.py"),
    ),
    Part("rules", ("rules.py",), ("tests/test_rules.py", "tests/test_gate_scores.py")),
    Part("blocks", ("blocks.py",), ("tests/test_blocks.py", "tests/test_blocks_groups.py")),
    Part(
        "methods",
        ("methods/*.py",),
        (
            "tests/methods/test_registry.py",
            "tests/methods/test_planners.py",
            "tests/methods/test_xattention.py",
            "tests/methods/test_flexprefill.py",
            "tests/methods/test_anchor_attention.py",
            "tests/methods/test_pbs.py",
            "tests/methods/test_per_head.py",
            "tests/methods/test_duo_attention.py",
            "tests/methods/test_moa.py",
            "tests/methods/test_seer_attention.py",
            "tests/methods/test_decoding.py",
            "tests/methods/test_conformance.py::test_bad_configurations_are_named",
            "tests/methods/test_conformance.py::test_every_number_has_a_least_value",
            "tests/methods/test_conformance.py::test_fields_of_another_type_are_named",
            "tests/methods/test_conformance.py::test_round_trip_through_a_dictionary",
            "tests/methods/test_conformance.py::test_a_dictionary_without_a_method_is_an_error",
            "-k",
            "not holds_no_mask",
        ),
    ),
    Part(
        "transformers",
        ("integrations/transformers/*.py",),
        (
            "tests/integrations/test_transformers_masks.py",
            "tests/integrations/test_transformers_fallback.py",
            "tests/integrations/test_transformers_encoders.py",
            "tests/integrations/test_transformers.py",
            "tests/integrations/test_transformers_state.py",
            "tests/integrations/test_transformers_prefixes.py",
            "tests/integrations/test_transformers_decoding.py",
            "tests/integrations/test_transformers_training.py",
            "tests/integrations/test_verify.py",
            "tests/integrations/test_transformers_parity.py",
            "-k",
            "not Compile and not executors_for_gpus and not small_budget_changes and "
            "(not parity_at_full or llama or gemma2 or gpt-oss)",
        ),
    ),
]
