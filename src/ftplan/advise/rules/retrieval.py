"""RAG: facts belong outside the weights."""

from __future__ import annotations

from ftplan.advise.facts import Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.rules.evaluation import HUYEN, OPENAI, OURS
from ftplan.advise.truth import Truth

FULL_CONTEXT_TOKENS = 200_000
"""Documents up to here fit a prompt (about 500 pages)."""
ENOUGH_RECALL = 0.95
ANTHROPIC = Source(mark="S", text="Anthropic, Contextual Retrieval (2024)")
OVADIA = Source(mark="E", text="Ovadia et al., Fine-Tuning or Retrieval?, arXiv 2312.05934")
SEARCHING = ("term", "embedding", "hybrid")


def in_place(f: Facts) -> Truth:
    """Some search runs before the model answers."""
    return f.among("rag", *SEARCHING)


def _recall_done(f: Facts) -> Truth:
    recall = f.state.retrieval_recall
    return Truth(recall is not None and recall >= ENOUGH_RECALL)


RULES = (
    Rule(
        code="RAG001",
        title="The documents fit into the prompt",
        when=lambda f: (
            f.has("information")
            & f.below("corpus_tokens", FULL_CONTEXT_TOKENS)
            & f.among("rag", "none")
        ),
        checks="Information is missing, all documents together have fewer than 200,000 tokens, "
        "and there is no retrieval.",
        step="full_context",
        reason="Nothing can be missed that is all there; with prompt caching it is also the "
        "cheapest to build and to keep.",
        sources=(ANTHROPIC,),
        strength="B",
        stop_when="failures of length or position appear, or the documents outgrow the prompt",
        flips_if="the documents grow, differ by user, or cost too much per call",
        fires=case("missing_private_knowledge", rag="none", corpus_tokens=120_000),
        rests=case("missing_private_knowledge", rag="none", corpus_tokens=5_000_000),
    ),
    Rule(
        code="RAG002",
        title="Information is missing: basic retrieval first",
        when=lambda f: f.has("information") & f.among("rag", "none"),
        checks="Information is missing, and there is no retrieval.",
        step="rag_basic",
        reason="The model cannot know it, so it has to be told. Term search (BM25) needs no "
        "embeddings and no vector database and already shows what retrieval is worth.",
        sources=(
            HUYEN,
            OVADIA,
            Source(mark="E", text="Soudani et al., arXiv 2403.01432: the least popular facts"),
        ),
        strength="B",
        stop_when="recall at k is measured; at 0.9 or more look at generation instead",
        flips_if="questions and documents share few words: then hybrid search from the start",
        fires=case("outdated_knowledge", rag="none"),
        rests=case("outdated_knowledge", rag="embedding"),
    ),
    Rule(
        code="RAG003",
        title="Retrieval misses: better retrieval",
        when=lambda f: (
            in_place(f)
            & ~_recall_done(f)
            & (
                f.has_kind("retrieval_miss")
                | (f.has("information") & (f.among("rag", "term", "embedding")))
                | (f.has("information") & f.below("retrieval_recall", 0.9))
            )
        ),
        checks="Retrieval is in place and information is still missing: passages are missed, or "
        "recall is under 0.9, or the search is not hybrid yet.",
        step="rag_advanced",
        reason="In this order: term search and embeddings together, reranking, chunks that carry "
        "their context, rewritten queries, a structured tool for tables.",
        sources=(
            ANTHROPIC,
            Source(mark="S", text="OpenAI DevDay 2023: 45 % to 98 % by retrieval work alone"),
            HUYEN,
        ),
        strength="A",
        stop_when="recall at 20 is 0.95 or more, or 2 iterations without gain",
        flips_if="the passages that are missed do not exist in the documents",
        fires=case("retrieval_miss", rag="embedding"),
        rests=case("retrieval_miss", rag="none"),
    ),
    Rule(
        code="RAG004",
        title="Retrieval brings noise: rerank, take fewer",
        when=lambda f: f.has_kind("retrieval_noise") & in_place(f) & ~f.known_true("rag_rerank"),
        checks="The right passage is there among distracting ones, and passages are not reranked.",
        step="rag_advanced",
        reason="Irrelevant passages lower the score of a model that had the right one. Rerank and "
        "cut k before anything else.",
        sources=(OPENAI,),
        strength="B",
        stop_when="dropping the other passages no longer changes answers",
        flips_if="the noise stays after reranking: then train with distractors (RAFT)",
        fires=case("retrieval_noise", rag="embedding"),
        rests=case("retrieval_noise", rag="embedding", rag_rerank=True),
    ),
    Rule(
        code="RAG005",
        title="Facts and form both fail: retrieval first",
        when=lambda f: (
            f.among("rag", "none")
            & f.share_at_least(0.2, "information")
            & f.share_at_least(0.2, "behavior", "capability")
        ),
        checks="Information is 20 % or more of the failures, behaviour or capability too, and "
        "there is no retrieval.",
        step="rag_basic",
        reason="Retrieval needs no training data and no serving of weights. Label again after it: "
        "some of the behaviour goes with the missing facts.",
        sources=(HUYEN, OURS),
        strength="B",
        stop_when="failures are labelled again with retrieval in place",
        flips_if="behaviour is 80 % or more, or the oracle test shows that facts do not help",
        fires=case(("outdated_knowledge", 40), ("wrong_tone_style", 60), rag="none"),
        rests=case(("outdated_knowledge", 5), ("wrong_tone_style", 95), rag="none"),
    ),
    Rule(
        code="RAG006",
        title="Behaviour fails and facts do not help: no retrieval",
        when=lambda f: f.share_at_least(0.8, "behavior") & f.oracle_does_not_fix,
        checks="Behaviour is 80 % or more of the failures, and pasting in the gold passage fixes "
        "only a minority of them.",
        step=None,
        blocks=("full_context", "rag_basic", "rag_advanced"),
        reason="Retrieved text that is not needed is noise: it lowered a tuned model from 87 to "
        "83 in one published case and hard cases by 3 points in another.",
        sources=(OPENAI, Source(mark="S", text="Checkr: retrieval on hard cases, 82 to 79")),
        strength="A",
        stop_when="-",
        flips_if="new failures are factual",
        fires=case(("wrong_tone_style", 50), oracle_context_fixes=0.1, oracle_context_tested=30),
        rests=case(("wrong_tone_style", 50), oracle_context_fixes=0.9, oracle_context_tested=30),
    ),
    Rule(
        code="RAG007",
        title="The whole document is needed: no retrieval",
        when=lambda f: f.has_kind("long_context_failure") & f.yes("gold_context_in_prompt"),
        checks="Failures come from length, and everything in the prompt is needed.",
        step="switch_model",
        blocks=("rag_basic", "rag_advanced"),
        reason="Retrieval picks parts; a summary of a whole document needs all of it. Read in "
        "parts and merge, or use a model with a longer context.",
        sources=(Source(mark="V", text="AWS Prescriptive Guidance, RAG versus fine-tuning"),),
        strength="C",
        stop_when="the long items pass like the short ones",
        flips_if="parts of the document suffice after all",
        fires=case("long_context_failure", gold_context_in_prompt=True),
        rests=case("long_context_failure", gold_context_in_prompt=False),
    ),
    Rule(
        code="RAG008",
        title="Weights cannot carry facts that change or must be cited",
        when=lambda f: (
            f.has("information")
            & (
                f.among("knowledge_changes", "monthly", "weekly", "daily")
                | f.yes("needs_citations")
            )
        ),
        checks="Information fails, and the facts change monthly or faster, or answers must cite.",
        step=None,
        blocks=("continued_pretrain",),
        reason="Trained facts are stale with the next change and cannot point at their source.",
        sources=(
            Source(mark="V", text="AWS Prescriptive Guidance, RAG versus fine-tuning"),
            Source(mark="E", text="Vercel, the v0 composite model family"),
        ),
        strength="B",
        stop_when="-",
        flips_if="the facts are static and there is a budget for continued pretraining",
        fires=case("outdated_knowledge", knowledge_changes="weekly"),
        rests=case("outdated_knowledge", knowledge_changes="never", needs_citations=False),
    ),
)
