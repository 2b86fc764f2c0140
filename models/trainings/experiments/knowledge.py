"""Knowledge: a table learned by heart, in entries that a layer reads by attention (generalised cross-attention).

Attention averages a token and the one before it alike, whatever they are, so that it cannot hold the table itself; left to choose what it
reads, it can.
"""

from models.attention.ngram import NGramConfig, ValuesOnlyConfig
from models.parts.knowledge import KnowledgeConfig
from models.trainings.measures import ACCURACY
from models.trainings.record import Better, Side, experiment
from models.trainings.shared import HEADS, attention, small
from workbench.lab.tasks import Facts

TABLE = Facts(vocab_size=12, length=25)
AVERAGE = attention(window=2, project=ValuesOnlyConfig(), score=NGramConfig(orders=(0,) * HEADS))

experiment(
    "knowledge",
    name="knowledge-base",
    architecture="knowledge-base",
    paper="Generalized Cross-Attention 2025",
    thing="knows 144 facts by its entries",
    task=TABLE,
    ours=Side("128 entries read with ReLU weights", small(AVERAGE, TABLE.vocab_size, mlp=KnowledgeConfig(128, 24, 24))),
    baseline=Side("no channel mixer", small(AVERAGE, TABLE.vocab_size, mlp=None)),
    measure=ACCURACY,
    rule=Better(0.95, 0.3),
    tried="With ordinary attention, which can choose what it reads, a model without a channel mixer knows 144 and even 576 facts as well.",
)
