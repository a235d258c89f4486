"""`Solver`: one problem, many branches decoded together, verified, and one of them chosen.

The prompt is computed once; branch k is a fork of it that begins its answer with hint k. All
branches are decoded together; for depth > 1 the best `beam` of them are forked again, the others
pruned. Then the model is asked about the answers, as far as the gates of `minirksc.rksc.cgee` leave
anything to ask, and one is selected. Whoever was not asked has no score.

With sharing "none" or "exact" and verify="always" nothing is approximated, unless the engine's cache
is int8: both give the same tokens up to rounding (see `minirksc.engine.sampling`), since the random numbers depend on
seed, path and position alone. What else approximates says so in the result: `BranchResult.sharing`, `exit_layer`
and `finish_reason`, `SolveResult.gates`.

Whatever happens, nothing but the prefix cache is left in the engine afterwards.

Source: Sekar 2026, arXiv 2606.09937 (branches, verification, score = p(YES) * sqrt(confidence)).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from minirksc.engine.prompts import Piece, Prompt, read_prompt
from minirksc.engine.request import salt_key
from minirksc.engine.signals import SIGNALS
from minirksc.errors import ConfigError, NumericalError, PromptError, brief
from minirksc.rksc.answers import parse_answer
from minirksc.rksc.cgee import DEFAULT_GATES, NO_GATES, PAPER_GATES, DecodeRule, Gates
from minirksc.rksc.gates_file import read_gates, settings_of
from minirksc.rksc.guard import refusal
from minirksc.rksc.judge import FAILED, Judge
from minirksc.rksc.node import Node
from minirksc.rksc.record import make_trace
from minirksc.rksc.results import BranchResult, SolveResult
from minirksc.rksc.solver_config import DEFAULT_SAMPLING, MAX_BRANCHES, SolverConfig, Tokens
from minirksc.rksc.tree import Tree
from minirksc.rksc.verify import Candidate, Verifier
from minirksc.token_ids import is_list

if TYPE_CHECKING:
    from minirksc.engine.request import Salt
    from minirksc.engine.session import Session
    from minirksc.rksc.asks import Probe

__all__ = ["DEFAULT_SAMPLING", "MAX_BRANCHES", "SolveResult", "Solver", "SolverConfig"]


class HasSession(Protocol):
    """What branches can be made on: an LLM."""

    def session(self) -> "Session":
        """The session that makes them."""
        ...


class Solver:
    """Solves problems on one LLM.

    Args:
        llm: or a session; used only while `solve` runs, and nothing but cached blocks is left in it.
        config: None: the defaults.

    Raises:
        ConfigError: the config needs text and the checkpoint has no tokenizer; or one of the two is something else.
    """

    def __init__(self, llm: "HasSession | Session", config: SolverConfig | None = None) -> None:
        if not hasattr(llm, "tokenizer"):
            raise ConfigError(f"a Solver works on an LLM, not on {brief(llm)}")
        if config is not None and not isinstance(config, SolverConfig):
            raise ConfigError(f"config {brief(config)} must be a SolverConfig(...), or None for the defaults")
        self.session: Session = llm.session() if hasattr(llm, "session") else llm
        self.config = config or SolverConfig()
        if self.session.tokenizer is None:
            self._check_needs_no_text()
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
            phrasings: one wording a branch, used instead of `problem` as its prompt; the standalone
                verification still asks about `problem`. What differing wordings share is their
                common beginning, and with semantic sharing perhaps all of the first.
            on_event: called with each event of the trace as it happens.
            salt: whose the problem is: nothing is shared with what has another salt, or none. A prompt may bring it as
                cache_salt; all that bring one must agree.

        Raises:
            ConfigError: not one wording a branch, text without a tokenizer, or salts that differ.
            PromptError: a wording is empty or no prompt, has ids outside the vocabulary, or is too long for what is to
                follow it; nothing has been computed then.
            CacheFullError: from the engine.
            NumericalError: from the engine, for all branches; a branch that fails alone is left out.
        """
        config = self.config
        if on_event is not None and not callable(on_event):
            raise ConfigError(f"on_event {brief(on_event)} must be a function of an event, or None")
        given = [problem, *self._phrasings(phrasings)]
        pieces = [read_prompt(one) for one in given]
        salt = _one_salt(salt, [piece.salt for piece in pieces])
        plain_problem, *own = [self._wording(piece) for piece in pieces]
        wordings = own or [plain_problem] * config.branches
        prompts = [self._prompt_ids(wording) for wording in wordings]
        chats = [self._is_chat(wording) for wording in wordings]
        hints = config.hints or [default_hint(k, chat) for k, chat in enumerate(chats)]
        share = config.sharing != "none"
        verifier = None
        if config.verify != "never":
            verifier = Verifier(self.session, config.verify_style, chat=chats[0], share=share, salt=salt)
        self._check_prompts(prompts, hints, verifier, plain_problem)
        seed = config.step_sampling.seed
        seed = self.session.engine.next_seed() if seed is None else seed
        with self.session.engine.call() as call:
            tree = Tree(self.session, call, share=share, seed=seed, salt=salt, on_event=on_event)
            probe, refusals = self._probe(wordings, tree)
            nodes = tree.plant(prompts, hints, probe, refusals)
            best, parsed = self._search(tree, nodes, plain_problem, verifier)
            tree.record.finish()
        return self._result(tree, best, parsed, plain_problem, own or None)

    def _phrasings(self, phrasings: Any) -> list[Any]:
        if phrasings is None:
            return []
        if not is_list(phrasings):
            raise ConfigError(f"phrasings must be a list of wordings, one a branch, not {brief(phrasings)}")
        wordings = list(phrasings)
        if len(wordings) != self.config.branches:
            raise ConfigError(f"{len(wordings)} phrasings for {self.config.branches} branches; give one a branch")
        return wordings

    def _check_prompts(
        self, prompts: Sequence[list[int]], hints: Sequence[Tokens], verifier: Verifier | None, problem: Tokens
    ) -> None:
        """Refuses what could not be computed to its end, before anything is."""
        engine, config = self.session.engine, self.config
        for prompt, hint in zip(prompts, hints, strict=True):
            if not prompt:
                raise PromptError("a problem or phrasing has no tokens; give at least one")
            num_hint = len(engine.check_token_ids(self.session.encode_fragment(hint), num_before=len(prompt)))
            engine.check_token_ids(prompt, num_before=num_hint)
            num_asked = len(prompt) if verifier is None else verifier.num_tokens(len(prompt), problem)
            num_answer = num_hint + config.depth * config.tokens_per_step
            if max(num_asked, len(prompt)) + num_answer > engine.max_model_len:
                raise PromptError(
                    f"{len(prompt)} prompt tokens, {num_answer} of hint and answer ({config.depth} x tokens_per_step "
                    f"{config.tokens_per_step}) and {max(num_asked - len(prompt), 0)} to ask about it are more than "
                    f"max_model_len {engine.max_model_len}; lower tokens_per_step, or shorten the problem"
                )

    def _search(
        self, tree: Tree, nodes: list[Node], problem: Tokens, verifier: Verifier | None
    ) -> tuple[Node, dict[int, str | None]]:
        """Grows the tree; returns the chosen node, and the answers of all that were left by node_id."""
        config = self.config

        def ask(asked: Sequence[Node]) -> None:
            self._ask(tree, asked, verifier, problem)

        leader = None
        for level in range(1, config.depth + 1):
            is_last = level == config.depth
            open_nodes = [node for node in nodes if not node.finished]
            # One that finished in an earlier round is a rival that is not under way: then nobody stops early.
            rule = self._decode_rule() if is_last and len(open_nodes) == len(nodes) else None
            tree.extend(open_nodes, config.step_sampling, rule)
            nodes = _well(nodes)
            if is_last:
                leader = None if rule is None else self._led_by(tree, rule, open_nodes)
                break
            ask([node for node in nodes if node.score is None])
            nodes = _well(nodes)
            survivors = sorted(nodes, key=lambda node: -(node.score or 0.0))[: config.beam]
            if all(node.finished for node in survivors):
                break
            nodes = tree.expand(nodes, survivors, config.branches)
        answers = [self._answer(node) for node in nodes]
        best = self._choose(tree, nodes, answers, leader, ask)
        well = _well(nodes)
        parsed = {node.node_id: answer for node, answer in zip(nodes, answers, strict=True) if node in well}
        with tree.record.phase("select", well) as event:
            event.update(rule=config.select, parsed=list(parsed.values()), best=best.node_id)
        return best, parsed

    def _choose(
        self,
        tree: Tree,
        nodes: Sequence[Node],
        answers: Sequence[str | None],
        leader: Node | None,
        ask: Callable[[Sequence[Node]], None],
    ) -> Node:
        """Asks about nodes as far as the gates leave anything to ask; returns the one that wins."""
        judge = Judge(
            self.gates,
            self.config.select,
            answers=answers,
            confidences=[node.confidence for node in nodes],
            values=[SIGNALS[self.gates.signal](node.signals) for node in nodes],
            leader=None if leader is None else nodes.index(leader),
        )
        while True:
            ruling = judge.ruling([node.score if node.error is None else FAILED for node in nodes])
            for note in ruling.notes:
                tree.record.note(**asdict(note))
            if not ruling.ask:
                return nodes[ruling.best]
            ask([nodes[i] for i in ruling.ask])

    def _led_by(self, tree: Tree, rule: DecodeRule, nodes: Sequence[Node]) -> Node | None:
        """Who led decisively while these nodes were decoded, and did not fail afterwards."""
        if rule.consensus is not None:
            tree.record.note(
                "consensus", "the others stopped", f"the vote for {rule.consensus!r} could not be lost any more"
            )
        if rule.leader is None:
            return None
        mode, leader = self.config.decode_exit_mode, nodes[rule.leader]
        reason = "the others stopped" if mode == "keep_leader" else "all stopped"
        asked = "nobody is asked" if leader.error is None else "it failed, so they are asked"
        calibrated = self.gates.is_calibrated
        tree.record.note("decode_exit", mode, f"{reason}; {asked}", node=leader, calibrated=calibrated)
        return leader if leader.error is None else None

    def _ask(self, tree: Tree, nodes: Sequence[Node], verifier: Verifier | None, problem: Tokens) -> None:
        """Sets verification and score, or error where asking failed."""
        if verifier is not None:
            with tree.record.phase("verify", nodes) as event:
                candidates = [Candidate(tree.exact_branch(node), self._answer_ids(node)) for node in nodes]
                verdicts = verifier.ask(problem, candidates, self.gates.layer_exit)
                event["probabilities"] = [verdict.probability for verdict in verdicts]
            for node, verdict in zip(nodes, verdicts, strict=True):
                node.verification, node.exit_layer, node.error = verdict.probability, verdict.exit_layer, verdict.error
                if verdict.saw_nan:
                    tree.record.note("layer_exit", "goes on", "a hidden state was not finite", node=node)
                elif verdict.exit_layer is not None:
                    reason = f"the margin of YES is clear: p(YES) {verdict.probability:.3f}"
                    tree.record.note(
                        "layer_exit",
                        "leaves",
                        reason,
                        node=node,
                        layer=verdict.exit_layer,
                        value=verdict.margin,
                        threshold=getattr(self.gates.layer_exit, "margin", None),
                        calibrated=self.gates.is_calibrated,
                    )
        for node in nodes:
            if verifier is None:
                node.score = node.confidence
            elif node.verification is not None:
                node.score = node.verification * math.sqrt(node.confidence or 0.0)

    def _decode_rule(self) -> DecodeRule:
        config, parser = self.config, self.config.answer_parser
        return DecodeRule(self.gates, config.decode_exit_mode, config.select, lambda text: parse_answer(text, parser))

    def _gates(self) -> Gates:
        config = self.config
        if config.verify != "auto":
            return NO_GATES
        if config.policy == "paper":
            return PAPER_GATES
        if config.gates is None:
            return DEFAULT_GATES
        gates = config.gates
        if not isinstance(gates, Gates):
            gates = read_gates(gates, self.session.model_path, settings_of(config, self.session))
        correction, num_layers = getattr(gates.layer_exit, "correction", None), self.session.spec.num_layers
        if correction is not None and len(correction) < num_layers - 1:
            raise ConfigError(
                f"the layer_exit of gates corrects {len(correction)} layers of {num_layers}; calibrate anew"
            )
        return gates

    def _probe(self, wordings: Sequence[str | list[int]], tree: Tree) -> tuple["Probe | None", list[str | None]]:
        """What compares wordings, and why some are not even compared."""
        config, session = self.config, self.session
        if config.sharing != "semantic" or all(wording == wordings[0] for wording in wordings):
            return None, []
        from minirksc.rksc.asks import make_paper_probe, make_probe  # it compares tensors: torch is there by now

        is_aligned = config.sharing_mode == "aligned"
        if config.policy == "paper":
            return make_paper_probe(session.spec, config.tau, aligned=is_aligned), [None] * len(wordings)
        texts = [wording if isinstance(wording, str) else session.decode(wording) for wording in wordings]
        probe = make_probe(
            session.spec,
            config.tau,
            aligned=is_aligned,
            can_move_kv=session.engine.runner.model.can_move_kv,
            uncalibrated=config.uncalibrated,
        )
        return probe, [refusal(texts[0], text) for text in texts]

    def _result(
        self,
        tree: Tree,
        best: Node,
        parsed: dict[int, str | None],
        problem: Tokens,
        phrasings: Sequence[Tokens] | None,
    ) -> SolveResult:
        nodes = [tree.nodes[node_id] for node_id in parsed]
        failed = [node for node in tree.nodes if node.error is not None]
        trace = make_trace(
            tree.record,
            self.session,
            tree.nodes,
            best,
            parsed,
            config=self.config,
            seed=tree.seed,
            problem=problem,
            phrasings=phrasings,
        )
        return SolveResult(
            answer=best.text,
            parsed=parsed[best.node_id],
            best=nodes.index(best),
            branches=[_branch_result(node, parsed.get(node.node_id)) for node in [*nodes, *failed]],
            stats=tree.record.stats,
            gates=self.gates.source,
            trace=trace,
        )

    def _answer(self, node: Node) -> str | None:
        """None where the vote was over before it had ended: a text that was cut off is nobody's answer."""
        is_cut = node.branch.finish_reason == "consensus"
        return None if is_cut else parse_answer(node.text, self.config.answer_parser)

    def _answer_ids(self, node: Node) -> list[int]:
        """Hint and generated tokens, without the end-of-sequence token."""
        ids = node.branch.token_ids[node.num_prompt_tokens :]
        tokenizer = self.session.tokenizer
        closed = tokenizer is not None and bool(ids) and ids[-1] in tokenizer.eos_token_ids
        return ids[:-1] if closed else ids

    def _is_chat(self, wording: Tokens) -> bool:
        tokenizer = self.session.tokenizer
        has_template = tokenizer is not None and tokenizer.has_chat_template
        return isinstance(wording, str) and self.config.chat and has_template

    def _wording(self, piece: Piece) -> str | list[int]:
        """Text or token ids of a prompt."""
        if piece.text is None:
            return piece.token_ids
        if self.session.tokenizer is None:
            raise ConfigError(f"{self.session.model_path} has no tokenizer; give the problem as token ids, not text")
        if not piece.text.strip():
            raise PromptError(f"the problem or a phrasing is empty: {brief(piece.text)}; give some text")
        return piece.text

    def _prompt_ids(self, wording: str | list[int]) -> list[int]:
        if not isinstance(wording, str):
            return wording
        tokenizer = self.session.need_tokenizer("text")
        if self._is_chat(wording):
            return tokenizer.encode_chat([{"role": "user", "content": wording}])
        return tokenizer.encode(wording)

    def _check_needs_no_text(self) -> None:
        config = self.config
        remedies = []
        if config.hints is None or any(isinstance(hint, str) for hint in config.hints):
            remedies.append("hints as token ids, such as [()] * branches")
        if config.verify != "never":
            remedies.append("verify='never'")
        if config.select != "score":
            remedies.append("select='score'")
        if remedies:
            raise ConfigError(f"{self.session.model_path} has no tokenizer; use {', '.join(remedies)}")


def default_hint(index: int, chat: bool) -> str:
    """How the answer of a branch begins where nobody says."""
    # In a conversation it begins the assistant's turn; in plain text, a paragraph.
    return f"Approach #{index + 1}:" if chat else f"\n\nApproach #{index + 1}:"


def _one_salt(salt: "Salt | None", own: Sequence["Salt | None"]) -> "Salt | None":
    """The salt of a call, or the one that its prompts bring."""
    given = [one for one in (salt, *own) if one is not None]
    if len({salt_key(one) for one in given}) > 1:
        raise ConfigError("the salts of a solve's prompts differ, or are not the call's; one solve has one salt")
    return given[0] if given else None


def _well(nodes: Sequence[Node]) -> list[Node]:
    """Those that did not fail.

    Raises:
        NumericalError: all did.
    """
    if all(node.error is not None for node in nodes):
        raise NumericalError(str(nodes[0].error))
    return [node for node in nodes if node.error is None]


def _branch_result(node: Node, answer: str | None) -> BranchResult:
    return BranchResult(
        text=node.text,
        token_ids=node.output_ids,
        score=node.score,
        confidence=node.confidence,
        verification=node.verification,
        sharing=node.sharing,
        similarity=node.similarity,
        exit_layer=node.exit_layer,
        finish_reason=node.branch.finish_reason,
        parsed=answer,
        depth=node.depth,
        path=tuple(node.branch.path),
        hint=node.hint,
        num_shared_tokens=node.num_shared_tokens,
        num_own_tokens=node.num_tokens - node.num_shared_tokens,
        num_saved_tokens=node.num_saved_tokens,
        error=node.error,
    )
