"use strict";
// What pyramid.py computes, for other settings: pure functions of the plan that is embedded in the page.
// A setting is {r, levels: [{on, rank, groups}]}; groups 0 is one pair per layer; LoRA has rank r.
const Pyramid = {
  groupsAmong: (groups, layers) => (groups === 0 ? layers : Math.min(groups, layers)),

  groupOf: (depth, groups, layers) => Math.floor((depth * Pyramid.groupsAmong(groups, layers)) / layers),

  // The numbers in one pair of a kind.
  parameters: (kind, rank) => kind.a * rank + kind.b * Math.floor(rank / kind.splits),

  // The rank of a level at a kind: a pattern's own ranks stay.
  rank: (kind, setting, level) => (kind.ranks ? kind.ranks[level] : setting.levels[level].rank),

  // The ranks that follow from the first: halved as in the short form, else in proportion.
  ranksFrom(plan, r) {
    const first = plan.levels[0].rank;
    return plan.levels.map((level, place) => {
      const rank = plan.halved ? r >> place : Math.floor((level.rank * r) / first);
      return Math.max(1, rank);
    });
  },

  // Every pair of a level at a kind, with the depths of the layers that share it.
  pairs(kind, setting, level) {
    const { groups } = setting.levels[level];
    const layers = kind.blocks.length;
    const found = Array.from({ length: Pyramid.groupsAmong(groups, layers) }, () => []);
    for (let depth = 0; depth < layers; depth++) found[Pyramid.groupOf(depth, groups, layers)].push(depth);
    return found;
  },

  count(plan, setting) {
    const levels = plan.levels.map(() => ({ pairs: 0, parameters: 0 }));
    const kinds = plan.kinds.map((kind) => {
      const layers = kind.blocks.length;
      let parameters = 0;
      setting.levels.forEach((level, place) => {
        if (!level.on) return;
        const pairs = Pyramid.groupsAmong(level.groups, layers);
        const numbers = pairs * Pyramid.parameters(kind, Pyramid.rank(kind, setting, place));
        levels[place].pairs += pairs;
        levels[place].parameters += numbers;
        parameters += numbers;
      });
      const loraRank = kind.ranks ? kind.ranks[0] : setting.r;
      return { parameters, lora: layers * Pyramid.parameters(kind, loraRank) };
    });
    const sum = (name) => kinds.reduce((total, kind) => total + kind[name], 0) + plan.magnitudes;
    return { levels, kinds, parameters: sum("parameters"), lora: sum("lora") };
  },
};
