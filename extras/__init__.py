"""What some runs ask for. Each module can be read alone and attaches itself from outside (support/extras.py says how);
the core imports none of them, and without this folder train.py trains as it stands.

They attach in the order of ALL: models on other machines first, which those that follow leave alone, then what changes
the student; several processes last.
"""
from extras import (api_teacher, code_metrics, compile, cross_tokenizer, families, fast, given, hints, lightning, lora,
                    low_memory, mixing, newer, parallel, reference, remote, report, router_loss, teacher_cache,
                    teacher_memory, teachers, token_view)

ALL = [remote, families, fast, lora, low_memory, mixing, teachers, cross_tokenizer, reference, given, newer,
       hints, router_loss, teacher_memory, report, compile, code_metrics, api_teacher, teacher_cache, lightning,
       token_view, parallel]
