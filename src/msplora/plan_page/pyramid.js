"use strict";
// What pyramid.py computes, for other settings: pure functions of the plan that is embedded in the page.
// A setting is {levels: [{on, rank, groups}]}; groups 0 is one pair per layer; LoRA has the first rank that is on.
const Pyramid = {
  groupsAmong: (groups, layers) => (groups === 0 ? layers : Math.min(groups, layers)),

  groupOf: (depth, groups, layers) => Math.floor((depth * Pyramid.groupsAmong(groups, layers)) / layers),

  // The numbers in one pair of a kind.
  parameters: (kind, rank) => kind.a * rank + kind.b * Math.floor(rank / kind.splits),

  halved: (r) => [r, r >> 1, r >> 2],

  // LoRA's rank at a kind: a pattern's own, else the first level's.
  firstRank: (kind, setting) => kind.rank ?? setting.levels.find(({ on }) => on).rank,

  // A kind's rank on every level, 0 where the level is off. From a pattern's own rank the others follow as
  // in config.py: halved where all are, else in proportion. One of 0 that is on msplora refuses.
  ranks(kind, setting) {
    const asked = setting.levels.filter(({ on }) => on).map(({ rank }) => rank);
    const r = asked[0];
    const own = Pyramid.firstRank(kind, setting);
    const halved = Pyramid.halved(r).join() === asked.join();
    const found = halved ? Pyramid.halved(own) : asked.map((rank) => (own === r ? rank : Math.floor((own * rank) / r)));
    let next = 0;
    return setting.levels.map(({ on }) => (on ? found[next++] : 0));
  },

  rank: (kind, setting, level) => Pyramid.ranks(kind, setting)[level],

  // The ranks that follow from the first: halved as in the short form, else in proportion.
  ranksFrom(plan, r) {
    const first = plan.levels[0].rank;
    return plan.levels.map((level, place) => {
      const rank = plan.halved ? Pyramid.halved(r)[place] : Math.floor((level.rank * r) / first);
      return Math.min(plan.mostRank, Math.max(1, rank));
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
      const ranks = Pyramid.ranks(kind, setting);
      let parameters = 0;
      setting.levels.forEach((level, place) => {
        if (!level.on) return;
        const pairs = Pyramid.groupsAmong(level.groups, layers);
        const numbers = pairs * Pyramid.parameters(kind, ranks[place]);
        levels[place].pairs += pairs;
        levels[place].parameters += numbers;
        parameters += numbers;
      });
      return { parameters, lora: layers * Pyramid.parameters(kind, Pyramid.firstRank(kind, setting)) };
    });
    const sum = (name) => kinds.reduce((total, kind) => total + kind[name], 0) + plan.magnitudes;
    return { levels, kinds, parameters: sum("parameters"), lora: sum("lora") };
  },
};
