"""Training language models on preferences, and judging what comes out. Needs the extra ``bdpo[llm]``.

Importing this package loads neither torch nor transformers; import the room you need.

========================  ==========================================================================
``bdpo.llm.language``     a language whose helpfulness and harmfulness a program computes exactly
``bdpo.llm.preferences``  preference files (HH, PKU-SafeRLHF, explicit prompts) as rows with prompts
``bdpo.llm.pairs``        pairs as tokens; log-probs of both responses in one pass over the prompt
``bdpo.llm.objective``    any objective of ``bdpo.losses`` on a batch, with its metrics
``bdpo.llm.trainer``      ``PreferenceTrainer``, on transformers' ``Trainer``
``bdpo.llm.trl_adapter``  the same objectives inside TRL's ``DPOTrainer``
``bdpo.llm.supervised``   supervised fine-tuning, which gives the reference
``bdpo.llm.scoring``      sampling, exact scores, learned reward and cost models, KL to the reference
``bdpo.llm.memory``       memory, communication and time of a step, on paper
``bdpo.llm.plan``         settings of a run and where they come from; ``runs``, ``report``, ``commands``
``bdpo.llm.experiment``   the recorded experiment of Table 2; ``real`` has that of Table 3, on real pairs
========================  ==========================================================================
"""
