"""`Solver`: one problem, many branches decoded together, verified, and one of them chosen.

The prompt is computed once; branch k is a fork of it that begins its answer with hint k. All
branches are decoded together; for depth > 1 the best `beam` of them are forked again, the others
pruned. Then the model is asked about the answers, as far as the gates of `minirksc.rksc.cgee` leave
anything to ask, and one is selected. A branch that was not asked about has no score.

With sharing "none" or "exact" and verify="always" nothing is approximated, unless the engine's cache
is int8: both give the same tokens up to rounding (see `minirksc.engine.sampling`), since the random numbers depend on
seed, path and position alone. What else approximates says so in the result: `BranchResult.sharing`, `exit_layer`
and `finish_reason`, `SolveResult.gates`.

Whatever happens, nothing but the prefix cache is left in the engine afterwards.

Source: Sekar 2026, arXiv 2606.09937 (branches, verification, score = p(YES) * sqrt(confidence)).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minirksc.engine.prompts import Prompt
from minirksc.engine.signals import SIGNALS
from minirksc.errors import ConfigError, NumericalError, brief
from minirksc.rksc.answers import parse_answer
from minirksc.rksc.cgee import DEFAULT_GATES, NO_GATES, PAPER_GATES, DecodeRule, Gates
from minirksc.rksc.gates_file import read_gates, settings_of
from minirksc.rksc.judge import FAILED, Judge, score_of
from minirksc.rksc.node import Node
from minirksc.rksc.problem import Problem, check_needs_no_text, read_problem
from minirksc.rksc.results import BranchResult, Choice, SolveResult, make_result
from minirksc.rksc.solver_config import DEFAULT_SAMPLING, MAX_BRANCHES, SolverConfig
from minirksc.rksc.tree import Tree
from minirksc.rksc.verify import Verdict, Verifier

if TYPE_CHECKING:
    from minirksc.engine.request import Salt
    from minirksc.engine.session import Session
    from minirksc.rksc.asks import Probe

__all__ = ["DEFAULT_SAMPLING", "MAX_BRANCHES", "BranchResult", "SolveResult", "Solver", "SolverConfig"]


class Solver:
    """Solves problems on one LLM.

    Args:
        llm: an `LLM`, or a session on one; used only while `solve` runs, and nothing but cached blocks is left in it.
        config: options; None: the defaults.

    Attributes:
        session: session that it works in.
        config: options.
        gates: gates that the options name.

    Raises:
        ConfigError: the config needs text and the checkpoint has no tokenizer; or one of the two is something else.
    """

    def __init__(self, llm: Any, config: SolverConfig | None = None) -> None:
        if config is not None and not isinstance(config, SolverConfig):
            raise ConfigError(f"config {brief(config)} must be a SolverConfig(...), or None for the defaults")
        self.session: Session = llm.session() if callable(getattr(llm, "session", None)) else llm
        if not hasattr(self.session, "extend"):
            raise ConfigError(f"a Solver works on an LLM or a session, not on {brief(llm)}")
        self.config = config or SolverConfig()
        if self.session.tokenizer is None:
            check_needs_no_text(self.session, self.config)
        self.gates = self._gates()

    def solve(
        self,
        problem: Prompt,
        phrasings: Iterable[Prompt] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        *,
        salt: "Salt | None" = None,
    ) -> SolveResult:
        """Solves one problem.

        Args:
            problem: text, or the token ids of a whole prompt (never put through the chat template), in any form of a
                prompt.
            phrasings: prompts used instead of `problem`, one a branch; the standalone verification still asks about
                `problem`. What differing phrasings share is their common beginning, and with semantic sharing perhaps
                all of the first.
            on_event: called with each event of the trace as it happens.
            salt: salt of the problem: nothing is shared with what has another salt, or none. A prompt may bring it as
                cache_salt; all that bring one must agree.

        Raises:
            ConfigError: not one phrasing a branch, text without a tokenizer, or salts that differ.
            PromptError: a phrasing is empty or no prompt, has ids outside the vocabulary, or is too long for what is to
                follow it; nothing has been computed then.
            CacheFullError: from the engine.
            NumericalError: from the engine, for all branches; a branch that fails alone is left out.
        """
        config, session = self.config, self.session
        if on_event is not None and not callable(on_event):
            raise ConfigError(f"on_event {brief(on_event)} must be a function of an event, or None")
        given = read_problem(session, config, problem, phrasings, salt)
        verifier = None if config.verify == "never" else Verifier(session, config, given)
        given.check_room(session, config, verifier.num_tokens if verifier else None)
        seed = config.step_sampling.seed
        seed = session.engine.next_seed() if seed is None else seed
        with session.engine.call() as call:
            tree = Tree(session, call, share=config.sharing != "none", seed=seed, salt=given.salt, on_event=on_event)
            nodes = tree.plant(given.starts, self._probe(given))
            choice = _Search(config, self.gates, tree, verifier).run(nodes)
            tree.record.finish()
        return make_result(tree, choice, given, config, self.gates.source)

    def _gates(self) -> Gates:
        config, gates = self.config, self.config.gates
        if config.verify != "auto":
            return NO_GATES
        if config.policy == "paper":
            return PAPER_GATES
        if gates is None:
            return DEFAULT_GATES
        if not isinstance(gates, Gates):
            gates = read_gates(gates, self.session.model_path, settings_of(config, self.session))
        correction, num_layers = getattr(gates.layer_exit, "correction", None), self.session.spec.num_layers
        if correction is not None and len(correction) < num_layers - 1:
            raise ConfigError(
                f"the layer_exit of gates corrects {len(correction)} layers of {num_layers}; calibrate anew"
            )
        return gates

    def _probe(self, given: Problem) -> "Probe | None":
        """What compares phrasings; None: nothing is to be compared."""
        phrasings = given.phrasings or []
        if self.config.sharing != "semantic" or all(one == phrasings[0] for one in phrasings):
            return None
        from minirksc.rksc.asks import make_probe  # it compares tensors: torch is there by now

        return make_probe(self.session.spec, self.config, can_move_kv=self.session.engine.runner.model.can_move_kv)


class _Search:
    """One solve from its first nodes to the choice: rounds of decoding, asking and forking.

    Args:
        config: options.
        gates: gates that are on.
        tree: tree that grows.
        verifier: asks about answers; None: none is asked about.
    """

    def __init__(self, config: SolverConfig, gates: Gates, tree: Tree, verifier: Verifier | None) -> None:
        self._config = config
        self._gates = gates
        self._tree = tree
        self._verifier = verifier

    def run(self, nodes: list[Node]) -> Choice:
        """Grows the tree round by round, and chooses among the nodes that remain."""
        config, leader = self._config, None
        for depth in range(1, config.depth + 1):
            open_nodes = [node for node in nodes if not node.finished]
            if depth == config.depth:
                # One that finished in an earlier round is a rival that is not under way: then none stops early.
                rule = self._decode_rule() if len(open_nodes) == len(nodes) else None
                self._tree.extend(open_nodes, config.step_sampling, rule)
                leader = None if rule is None else self._leader(rule, open_nodes)
                break
            self._tree.extend(open_nodes, config.step_sampling)
            nodes = _well(nodes)
            self._ask([node for node in nodes if node.score is None])
            nodes = _well(nodes)
            survivors = sorted(nodes, key=lambda node: -(node.score or 0.0))[: config.beam]
            if all(node.finished for node in survivors):
                break
            nodes = self._tree.expand(nodes, survivors, config.branches)
        return self._choose(_well(nodes), leader)

    def _choose(self, nodes: Sequence[Node], leader: Node | None) -> Choice:
        """Asks about nodes as far as the gates leave anything to ask; then one of them wins."""
        answers = {node: self._answer(node) for node in nodes}
        judge = Judge(
            self._gates,
            self._config.select,
            answers=list(answers.values()),
            confidences=[node.confidence for node in nodes],
            values=[SIGNALS[self._gates.signal](node.signals) for node in nodes],
            leader=None if leader is None else nodes.index(leader),
        )
        while True:
            ruling = judge.ruling([node.score if node.error is None else FAILED for node in nodes])
            for note in ruling.notes:
                self._tree.record.note(**asdict(note))
            if not ruling.ask:
                break
            self._ask([nodes[i] for i in ruling.ask])
        best, well = nodes[ruling.best], _well(nodes)
        choice = Choice(best, {node: answers[node] for node in well})
        with self._tree.record.phase("select", well) as event:
            event.update(rule=self._config.select, parsed=list(choice.answers.values()), best=best.node_id)
        return choice

    def _ask(self, nodes: Sequence[Node]) -> None:
        """Sets verification and score, or error where asking failed."""
        if self._verifier is None:
            for node in nodes:
                node.score = node.confidence
            return
        with self._tree.record.phase("verify", nodes) as event:
            branches = [self._tree.exact_branch(node) for node in nodes]
            verdicts = self._verifier.ask(branches, [node.answer_ids for node in nodes], self._gates.layer_exit)
            event["probabilities"] = [verdict.probability for verdict in verdicts]
        for node, verdict in zip(nodes, verdicts, strict=True):
            node.verification, node.exit_layer, node.error = verdict.probability, verdict.exit_layer, verdict.error
            self._note_exit(node, verdict)
            if verdict.probability is not None:
                node.score = score_of(verdict.probability, node.confidence)

    def _note_exit(self, node: Node, verdict: Verdict) -> None:
        """Notes what the layer exit decided in the pass of a verdict, if anything."""
        rule = self._gates.layer_exit
        if verdict.saw_nan:
            self._tree.record.note("layer_exit", "goes on", "a hidden state was not finite", node=node)
        elif rule is not None and verdict.exit_layer is not None:
            self._tree.record.note(
                "layer_exit",
                "leaves",
                f"{rule.reason}: p(YES) {verdict.probability:.3f}",
                node=node,
                layer=verdict.exit_layer,
                value=verdict.margin,
                threshold=rule.threshold,
                calibrated=self._gates.is_calibrated,
            )

    def _decode_rule(self) -> DecodeRule:
        config, parser = self._config, self._config.answer_parser
        return DecodeRule(self._gates, config.decode_exit_mode, config.select, lambda text: parse_answer(text, parser))

    def _leader(self, rule: DecodeRule, nodes: Sequence[Node]) -> Node | None:
        """The node that led decisively while these were decoded, and did not fail afterwards."""
        note, mode = self._tree.record.note, self._config.decode_exit_mode
        if rule.consensus is not None:
            note("consensus", "the others stopped", f"the vote for {rule.consensus!r} could not be lost any more")
        if rule.leader is None:
            return None
        leader = nodes[rule.leader]
        stopped = "the others stopped" if mode == "keep_leader" else "all stopped"
        asked = "nobody is asked" if leader.error is None else "it failed, so they are asked"
        note("decode_exit", mode, f"{stopped}; {asked}", node=leader, calibrated=self._gates.is_calibrated)
        return leader if leader.error is None else None

    def _answer(self, node: Node) -> str | None:
        """None where the vote was over before it had ended: a text that was cut off is no answer."""
        is_cut = node.branch.finish_reason == "consensus"
        return None if is_cut else parse_answer(node.text, self._config.answer_parser)


def _well(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that did not fail.

    Raises:
        NumericalError: all did.
    """
    if all(node.error is not None for node in nodes):
        raise NumericalError(str(nodes[0].error))
    return [node for node in nodes if node.error is None]
