"""Names of the policies, which the command line lists: imported without torch."""

SCORED = ("threshold", "entropy", "margin")  # a limit on a score of the exit's logits; see `policies.SCORES`
POLICIES = ("off", *SCORED, "patience", "fixed", "lossless")
DRAFT_WEIGHTS = ("model", "int8")  # of the early layers that draft
DRAFT_SOURCES = ("exits", "prompt")  # of lossless
