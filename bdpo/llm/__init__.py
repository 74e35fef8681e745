"""Language-model experiments: preference data, trainers, scoring. Needs the extra ``bdpo[llm]``.

Importing this package loads neither torch nor transformers; import the room you need.

========================  ==========================================================================
``bdpo.llm.language``     a language whose helpfulness and harmfulness a program computes exactly
``bdpo.llm.preferences``  preference files (HH, PKU-SafeRLHF, explicit prompts) as rows with prompts
``bdpo.llm.scoring``      sampling, exact scores, learned reward and cost models, KL to a reference
========================  ==========================================================================
"""
