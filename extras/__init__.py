"""What some runs ask for. Each module can be read alone and attaches itself from outside (support/extras.py says how);
the core imports none of them, and without this folder train.py trains as it stands.

They attach in the order of ALL: what changes the student comes first, several processes last.
"""
from extras import (code_metrics, compile, cross_tokenizer, families, fast, given, lora, low_memory, mixing, parallel,
                    reference, report, router_loss, teacher_memory, teachers,
                    token_view)

ALL = [families, fast, lora, low_memory, mixing, teachers, cross_tokenizer, reference, given, router_loss, teacher_memory,
       report, compile, code_metrics, token_view, parallel]
