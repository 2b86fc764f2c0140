"""Measurements on the Dragon Hatchling: synapses, exact attribution of its state, sparsity, and edits of single synapses.

Words used in this package, for a model with L layers over one set of weights:

neuron (head, j)    one of N per head. x [batch, head, pos, neuron] is its sparse activity, y = x ⊙ gate its gated activity.
state ρ_l           [batch, head, neuron, d_model], fixed frame: Σ_τ (R_τ x_{τ,l}) ⊗ v_{τ,l}, v the residual stream entering layer l.
synapse             source neuron's y at layer k to target neuron's x at layer l > k (the paper: k = l − 1).
coefficient c       v_{τ,l} = c_emb cen(embedding) + Σ_{k<l} c_{τ,k→l} cen(E y_{τ,k}): the layer norms' scales, taken as they were.

Position 0 reads nothing, so y = 0 there; no statistic includes it.
"""

from workbench.lazy import lazy_names

_HOME = {
    "Synapse": "capture",
    "capture_writes": "capture",
    "trace_synapses": "synapses",
    "SynapseTraces": "synapses",
    "sparse_activations": "sparse",
    "SparseActivations": "sparse",
    "strongest_synapses": "top_synapses",
    "most_changed_synapses": "top_synapses",
    "most_read_synapses": "top_synapses",
    "search_cost": "top_synapses",
    "TopSynapses": "top_synapses",
    "attribute_state": "attribution",
    "StateAttribution": "attribution",
    "explained_by_paper": "attribution",
    "who_wrote": "attribution",
    "who_wrote_synapse": "attribution",
    "neuron_says": "meaning",
    "row_says": "meaning",
    "says": "meaning",
    "synapse_value": "interventions",
    "change_synapse": "interventions",
    "ablate_synapse": "interventions",
    "clamp_synapse": "interventions",
    "copy_synapse": "interventions",
    "mute_synapse": "interventions",
    "freeze_writes": "interventions",
    "block_reads": "interventions",
    "ablate_neurons": "interventions",
    "copy_state": "interventions",
    "measure_sparsity": "sparsity",
    "Sparsity": "sparsity",
    "SparsityWatch": "sparsity_training",
    "card_curve": "sparsity_training",
    "over_steps": "sparsity_training",
    "SparsityPoint": "sparsity_training",
    "read_sparsity": "sparsity_training",
    "octiles": "timescales",
    "neurons_of": "timescales",
    "periods": "timescales",
    "read_circuit": "reading",
    "ReadCircuit": "reading",
    "matching_pairs": "reading",
    "MatchingPairs": "reading",
    "find_concept_synapses": "concepts",
    "ConceptSynapses": "concepts_results",
    "concept_transfer": "concepts_transfer",
    "ConceptTransfer": "concepts_transfer",
    "dictionary_features": "concepts_features",
    "stored_features": "concepts_features",
    "causal_check": "concepts_causal",
    "marked_positions": "concepts_causal",
    "CausalCheck": "concepts_causal",
    "u_to_rank_biserial": "concepts_statistics",
    "u_to_p": "concepts_statistics",
    "parameter_graph": "neuron_graph",
    "state_graph": "neuron_graph",
    "coactivation_graph": "neuron_graph",
    "NeuronGraph": "neuron_graph",
    "weight_distribution": "neuron_graph_tails",
    "WeightDistribution": "neuron_graph_edges",
    "head_census": "neuron_graph_tails",
    "HeadPair": "neuron_graph_tails",
    "graph_modularity": "neuron_graph_modularity",
    "compare_modularity": "neuron_graph_modularity",
    "modularity_curve": "neuron_graph_modularity",
    "ModularityCurve": "neuron_graph_modularity",
    "rewired_graph": "neuron_graph_modularity",
    "random_graph": "neuron_graph_modularity",
    "initial_weights": "neuron_graph_modularity",
    "communities": "neuron_graph_modularity",
    "degree_tails": "neuron_graph_degrees",
    "fit_degree_tail": "neuron_graph_degrees",
    "DegreeTail": "neuron_graph_degrees",
    "graph_hubs": "neuron_graph_hubs",
    "Hub": "neuron_graph_hubs",
}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
