"""ExpertPoolingCallback: from experts of their own to a dense model, by one number."""

import math
from collections import Counter

import pytest
import torch
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from tiny_models import DOMAINS, make_dense, make_pairs

import moe_fast
from moe_fast.layers import MoEMLP
from moe_fast.losses import InfoNCELoss
from moe_fast.training import ExpertPoolingCallback, MoESentenceTransformerTrainer
from moe_fast.training.pooling import pool

ROWS = dict(zip(DOMAINS, (20, 300, 0), strict=True))


COUNTS = Counter(make_pairs(24)["domain"])


def train(folder, callbacks=(), steps=3, model=None, **settings):
    model = model or moe_fast.upcycle(
        make_dense(), **({"num_experts": 3, "routing": "enforced", "domains": DOMAINS} | settings)
    )
    trainer = MoESentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(folder),
            max_steps=steps,
            learning_rate=1e-2,
            max_grad_norm=0,  # the norm of three experts' gradients is not that of one MLP's
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=make_pairs(24),
        loss=InfoNCELoss(model),
        callbacks=list(callbacks),
    )
    trainer.train()
    return model


def experts_of(model):
    """{name: weights [E, ...]}, and the domain tokens' embeddings."""
    encoder = model.transformers_model
    found = {
        f"{i} {name}": value.detach()
        for i, module in enumerate(encoder.modules())
        if hasattr(module, "expert_parameters")
        for name, value in module.expert_parameters()
    }
    tokens = encoder.config.domain_token_ids
    return found | {"tokens": encoder.get_input_embeddings().weight[tokens].detach()}


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_a_loop(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    shares = [0.2, 1.0, 0.0]
    expected = gradients.double().clone()
    for e, share in enumerate(shares):
        for other in range(3):
            if other != e:
                expected[e] += share * gradients[other].double()
    pool(gradients, torch.tensor(shares))
    error = (gradients.double() - expected).norm() / expected.norm()
    assert error <= {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


def test_shares_fall_with_the_rows_of_a_domain():
    shares = ExpertPoolingCallback(ROWS, strength=100).shares(DOMAINS)
    assert shares.tolist() == pytest.approx([100 / 120, 100 / 400, 1.0])
    assert ExpertPoolingCallback(ROWS, strength=0).shares(DOMAINS).tolist() == [0, 0, 0]
    assert ExpertPoolingCallback(ROWS, strength=math.inf).shares(DOMAINS).tolist() == [1, 1, 1]


def test_without_limit_every_expert_is_what_the_dense_model_becomes(tmp_path):
    together = train(tmp_path, [ExpertPoolingCallback(COUNTS, math.inf)], domain_tokens=False)
    dense = train(tmp_path, model=make_dense())
    mlps = dense.transformers_model.encoder.layer
    for i, mlp in enumerate(m for m in together.modules() if isinstance(m, MoEMLP)):
        for e in range(3):
            torch.testing.assert_close(mlp.up_proj[e], mlps[i].intermediate.dense.weight)
            torch.testing.assert_close(mlp.down_proj[e], mlps[i].output.dense.weight)


def test_zero_changes_nothing(tmp_path):
    plain, pooled = train(tmp_path), train(tmp_path, [ExpertPoolingCallback(COUNTS, 0.0)])
    for name, values in experts_of(plain).items():
        assert torch.equal(values, experts_of(pooled)[name]), name


def test_it_can_end_after_some_steps(tmp_path):
    first = experts_of(train(tmp_path, [ExpertPoolingCallback(COUNTS, math.inf, steps=2)], 2))
    later = experts_of(train(tmp_path, [ExpertPoolingCallback(COUNTS, math.inf, steps=2)], 3))
    assert all(torch.equal(v, v[:1].expand_as(v)) for v in first.values())
    assert any(not torch.equal(v, v[:1].expand_as(v)) for v in later.values())


@pytest.mark.parametrize("strength", [-1, math.nan])
def test_other_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be a number of at least 0; got"):
        ExpertPoolingCallback(ROWS, strength)


def test_negative_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="rows must be numbers of at least 0; got {'metal': -1}"):
        ExpertPoolingCallback(ROWS | {"metal": -1})


def test_other_models_and_domains_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="routing='enforced'.*got a dense model"):
        train(tmp_path, [ExpertPoolingCallback(COUNTS)], model=make_dense())
    with pytest.raises(ValueError, match="routing='enforced'.*got routing='token_topk'"):
        train(tmp_path, [ExpertPoolingCallback(COUNTS)], routing="token_topk")
    with pytest.raises(ValueError, match="a number for each of the model's domains"):
        train(tmp_path, [ExpertPoolingCallback({"fruit": 3})])
