"""A worker's side: which policy a row has, what becomes of one that fails, and whose pages are whose. Needs no vLLM."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Policy, sparse_attention
from gossamer.integrations.vllm.counters import FOLDER
from gossamer.integrations.vllm.engine import Engine, call_of, salt_of
from gossamer.integrations.vllm.rows import Row
from gossamer.integrations.vllm.settings import Settings
from gossamer.methods import AShape, Corrected, Dense, DuoAttention, Method, PerHead
from gossamer.plan import Extent

LIKE = torch.empty(1, 4, 1, 16, device="meta")
GATES = [[0.1, 0.9], [0.8, 0.2]]


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)


def engine(given: Any = "a_shape", rank: int = 0) -> Engine:
    return Engine(Settings.of(given), LIKE, rank)


def total(of: Engine, metric: str, **labels: str) -> float:
    return sum(value for name, its, value in of.counters.rows() if name == metric and labels.items() <= its.items())


def row(queries: int = 96, past: int = 0, policy: Policy | None = None) -> Row:
    return Row(0, 5, 5 + queries, past + queries, policy or Policy(AShape(1, 20), 0))


def tensors(tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, 4, 16, generator=generator)
    k, v = (torch.randn(1, 2, keys, 16, generator=generator) for _ in range(2))
    return q, k, v


PLAIN: dict[str, Any] = {"window": None, "scale": 0.3, "softcap": None, "sinks": None, "layer": 1}


def made(of: Row, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> AttentionCall:
    return call_of(of, q, k, v, **{**PLAIN, **changes})


def call(queries: int = 96, past: int = 0, window: int | None = None) -> AttentionCall:
    return made(row(queries, past), *tensors(queries, queries + past), window=window)


class Failing(Method):
    """Raises what it is given."""

    name: ClassVar[str] = "failing"
    error: ClassVar[BaseException] = ValueError("no")

    def plan(self, call: AttentionCall) -> Any:
        raise self.error


class TestACall:
    def test_is_the_row_with_its_past(self) -> None:
        q, k, v = tensors(96, 140)
        found = made(row(96, 44), q, k, v, window=30, softcap=5.0, sinks=torch.ones(4))
        expected = AttentionCall(
            q.transpose(0, 1)[None], k, v, Extent([44], [96], [0], [140], limit=30), 0.3, torch.ones(4), 5.0, 1
        )
        policy = Policy(Dense("gossamer"))
        assert torch.equal(engine().attend(found, policy), engine().attend(expected, policy))
        assert found.layer == 1

    def test_may_have_the_last_keys_alone(self) -> None:
        """As many as its window sees: positions then count from the first that is there."""
        q, k, v = tensors(96, 140)
        whole = made(row(96, 44), q, k, v, window=12)
        part = made(row(96, 44), q, k[:, :, 33:], v[:, :, 33:], window=12)
        dense = Policy(Dense("gossamer"))
        torch.testing.assert_close(engine().attend(whole, dense), engine().attend(part, dense), atol=1e-5, rtol=1e-4)
        assert part.extent.count_allowed() == whole.extent.count_allowed()


class TestAttending:
    def test_is_sparse_attention_and_counted(self) -> None:
        worker, asked = engine(), call(past=30)
        policy = Policy(AShape(1, 20), 0)
        out = worker.attend(asked, policy)
        assert out.shape == (1, 4, 96, 16)
        expected = sparse_attention(asked.q, asked.k, asked.values, policy, scale=0.3)
        assert torch.equal(out, expected)
        assert total(worker, "gossamer_rows", layer="1", method="a_shape", path="sparse") == 1
        pairs = sum(position + 1 for position in range(30, 126))
        assert total(worker, "gossamer_pairs") == pairs
        computed = sum(min(position + 1, 21) for position in range(30, 126))
        assert total(worker, "gossamer_computed_pairs") == pytest.approx(computed, rel=1e-6)

    def test_counts_a_window_s_pairs_alone(self) -> None:
        worker = engine()
        worker.attend(call(past=30, window=8), Policy(Dense("gossamer")))
        assert total(worker, "gossamer_pairs") == total(worker, "gossamer_computed_pairs") == 96 * 8

    @pytest.mark.parametrize(
        "error", [ValueError("no"), TypeError("no"), RuntimeError("no"), IndexError("no"), NotImplementedError("no")]
    )
    def test_a_method_that_fails_runs_dense_and_is_counted(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(Failing, "error", error)
        worker, asked = engine(), call()
        with caplog.at_level(logging.WARNING, "vllm.gossamer"):
            outs = [worker.attend(asked, Policy(Failing(), 0)) for _ in range(2)]
        dense = sparse_attention(asked.q, asked.k, asked.values, Dense("gossamer"), scale=0.3)
        assert all(torch.equal(out, dense) for out in outs)
        assert total(worker, "gossamer_rows", method="failing", path="dense") == 2
        assert total(worker, "gossamer_rows") == 2
        assert total(worker, "gossamer_dense_rows", reason="method failed") == 2
        assert [message for _, _, message in caplog.record_tuples] == [
            "gossamer: failing fails, its rows run dense (said once): no"
        ]

    def test_a_plan_that_cannot_be_corrected_is_such_a_failure(self) -> None:
        """Nothing but planning finds it out."""
        worker, asked = engine(), call()
        given = '{"method": "corrected", "base": {"method": "a_shape"}, "min_tokens": 0}'
        out = worker.attend(asked, worker.policy_of(given))
        assert total(worker, "gossamer_dense_rows", reason="method failed", layer="1") == 1
        assert torch.equal(out, sparse_attention(asked.q, asked.k, asked.values, Dense("gossamer"), scale=0.3))

    def test_an_interrupt_is_none_of_its_failures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Failing, "error", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine().attend(call(), Policy(Failing(), 0))


class TestPolicies:
    def test_a_request_without_one_has_the_server_s(self) -> None:
        worker = engine({"method": "a_shape", "min_tokens": 77})
        assert worker.policy_of(None) is worker.default == Policy(AShape(), 77)

    def test_all_have_a_number_of_tokens(self) -> None:
        worker = engine()
        assert worker.default.min_tokens == 2048
        assert worker.policy_of("max_relative").min_tokens == 2048
        assert worker.policy_of({"method": "max_relative", "min_tokens": 3}).min_tokens == 3

    def test_one_that_cannot_be_used_is_dense(self, caplog: pytest.LogCaptureFixture) -> None:
        worker = engine()
        for given in ("nothing", 7, {"method": "a_shape", 3: 4}, [1]):
            with caplog.at_level(logging.WARNING, "vllm.gossamer"):
                assert worker.policy_of(given) == Policy(Dense("gossamer"), 0)
        assert len(caplog.records) == 4

    def test_many_are_not_kept_for_ever(self) -> None:
        worker = engine()
        for tokens in range(1100):
            worker.policy_of({"method": "a_shape", "min_tokens": tokens})
        assert len(worker._of_request) <= 1024


class TestLayers:
    def test_any_is_served_by_a_method_for_all(self) -> None:
        assert engine().why_not(None, 4) is None
        assert engine().why_not(7, 3) is None

    @pytest.mark.parametrize(
        "method",
        [
            PerHead([[AShape()] * 4] * 2),
            DuoAttention(GATES),
            Corrected(DuoAttention(GATES)),
            PerHead([[Corrected(DuoAttention(GATES))] * 4] * 2),
        ],
        ids=["per head", "table", "table inside", "table of heads"],
    )
    def test_one_that_a_profile_or_table_lacks_is_not(self, method: Method) -> None:
        for settings in (Settings(Policy(method)), Settings(Policy(AShape()), policies={"x": Policy(method)})):
            worker = Engine(settings, LIKE)
            assert worker.why_not(1, 4) is None
            assert worker.why_not(2, 4) == worker.why_not(None, 4) == "layer is not in the profile"
            if isinstance(method, PerHead):
                assert worker.why_not(1, 2) == "layer has other heads than the profile"


class TestSteps:
    def test_a_step_of_short_rows_is_not_looked_at(self) -> None:
        for longest, reason in ((1, "decode"), (63, "few queries")):
            step = engine().step(torch.arange(4), torch.full((3,), 9), longest, None)
            assert step.rows == ()
            assert step.reasons == {reason: 3}

    def test_rows_have_their_policies(self) -> None:
        worker, starts, lengths = engine(), torch.tensor([0, 1, 3001]), torch.tensor([50, 3000])
        assert [row.policy for row in worker.step(starts, lengths, 3000, None).rows] == [worker.default]
        mine = worker.policy_of("max_relative")
        assert [row.policy for row in worker.step(starts, lengths, 3000, [worker.default, mine]).rows] == [mine]

    def test_a_refused_step_says_why(self) -> None:
        step = engine().refused(3, "not causal")
        assert step.count() == 3
        assert step.reasons == {"not causal": 3}

    def test_rank_0_writes_the_log_now_and_then(self, caplog: pytest.LogCaptureFixture) -> None:
        first, second = engine(), engine(rank=1)
        with caplog.at_level(logging.INFO, "vllm.gossamer"):
            for worker in (first, second):
                worker.attend(call(), Policy(AShape(1, 20), 0))
                for _ in range(3):
                    worker.refused(1, "decode")
        lines = [message for _, _, message in caplog.record_tuples if "a_shape: 1 sparse" in message]
        assert len(lines) == 1


class TestSalt:
    SERVER = Settings.of({"method": "a_shape", "policies": {"same": "a_shape", "other": "dense"}})

    @pytest.mark.parametrize("salt", [None, "theirs"])
    @pytest.mark.parametrize("given", [None, "a_shape", "same", '{"method": "a_shape"}', {"method": "a_shape"}])
    def test_the_server_s_policy_shares_pages_with_those_that_name_none(self, given: Any, salt: str | None) -> None:
        assert salt_of(self.SERVER, given, salt) == salt

    def test_each_other_policy_has_pages_of_its_own(self) -> None:
        others = ["other", "max_relative", {"method": "a_shape", "sink": 1}, {"method": "a_shape", "min_tokens": 0}]
        salts = [salt_of(self.SERVER, given, None) for given in others]
        assert all(salts)
        assert len(set(salts)) == len(others)
        assert salt_of(self.SERVER, "dense", None) == salts[0]
        assert salt_of(self.SERVER, {"sink": 1, "method": "a_shape"}, None) == salts[2]

    def test_a_salt_of_the_request_s_own_stays_apart(self) -> None:
        salts = {salt_of(self.SERVER, "dense", salt) for salt in (None, "a", "b")}
        assert len(salts) == 3

    def test_a_salt_of_the_request_s_own_does_not_pass_for_that_of_a_policy(self) -> None:
        ours = salt_of(self.SERVER, "dense", None)
        assert ours
        forged = [ours, f"plain:{ours}", f"gossamer:plain:{ours}"]
        found = [salt_of(self.SERVER, None, salt) for salt in forged]
        assert len({ours, *found}) == 4
        a = salt_of(self.SERVER, "dense", "a")
        assert salt_of(self.SERVER, None, a) != a
        assert salt_of(self.SERVER, None, "mine") == "mine"

    def test_a_policy_that_is_none_has_no_salt(self) -> None:
        with pytest.raises(ValueError, match="unknown method 'x'"):
            salt_of(self.SERVER, "x", None)
